"""The timer of `forwax.diagnose`, and one line on the machine."""

import platform

import jax

from forwax._reports.timing import interleaved, medians, ratios

__all__ = ["interleaved", "machine", "medians", "ratios"]


def machine() -> str:
    """One line on what the figures were measured with."""
    devices = jax.devices()
    return (
        f"jax {jax.__version__}, Python {platform.python_version()}, {len(devices)} "
        f"{devices[0].platform} device(s), {platform.machine()}"
    )
