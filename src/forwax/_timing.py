"""Timing side by side: every function once per round, so that a busy machine slows all alike."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = math.inf
) -> dict[str, np.ndarray]:
    """Seconds of each function in each round, [rounds]; the order turns from round to round.

    Args:
        functions: compiled and warm.
        rounds: how many rounds.
        seconds: no round begins after so many seconds, but for the first three.
    """
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - started > seconds:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds_of(functions[name]))
    return {name: np.array(times) for name, times in taken.items()}


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of one call, the wait for its arrays included."""
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started
