"""Timing side by side: every function once per round, so that a busy machine slows all alike."""

import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import forwax._timing


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each function in each round [rounds], after one call that warms it up."""
    for function in functions.values():
        jax.block_until_ready(function())
    return forwax._timing.interleaved(functions, rounds)


def ratios(seconds: Mapping[str, np.ndarray], reference: str) -> dict[str, float]:
    """Median time of each function over the median time of the reference."""
    return {
        name: float(np.median(times) / np.median(seconds[reference]))
        for name, times in seconds.items()
    }


def machine() -> str:
    """One line on what the figures were measured with."""
    devices = jax.devices()
    return (
        f"jax {jax.__version__}, Python {platform.python_version()}, {len(devices)} "
        f"{devices[0].platform} device(s), "
        f"{platform.machine()}"
    )
