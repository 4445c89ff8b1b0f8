"""Timing side by side: every function once per round, so that a busy machine slows all of them alike."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each function in each round [rounds], compiled and warm; the order turns from round to round."""
    for function in functions.values():
        jax.block_until_ready(function())
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


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
