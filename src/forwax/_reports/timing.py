"""Timing side by side, in turn, so that a busy machine slows all programs alike."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

FEWEST_ROUNDS = 3

Seconds: TypeAlias = dict[str, np.ndarray]
"""The seconds of calls by name, each [rounds]."""


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    max_seconds: float = math.inf,
) -> Seconds:
    """Seconds of each call in each round; every round makes all calls once.

    Args:
        calls: what is timed, by name, until its arrays are there; each is made once before the
            first round, so that none is timed while it compiles.
        rounds: the number of rounds.
        max_seconds: no further round begins after so many seconds, but for the first three.

    Returns:
        The seconds by name, each [rounds].
    """
    for call in calls.values():
        jax.block_until_ready(call())
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        may_stop = number >= FEWEST_ROUNDS
        if may_stop and time.perf_counter() - begin > max_seconds:
            break
        # The order turns: a call may leave the caches warm, or the processor hot, for the next one.
        first = number % len(names)
        in_turn = names[first:] + names[:first]
        for name in in_turn:
            seconds[name].append(seconds_of(calls[name]))
    return {name: np.array(times) for name, times in seconds.items()}


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, the wait for its arrays included."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def medians(seconds: Mapping[str, Any]) -> dict[str, float]:
    """The median over the rounds of each call's seconds."""
    return {name: float(np.median(times)) for name, times in seconds.items()}


def ratios(seconds: Seconds, reference: str) -> dict[str, float]:
    """The median of each call over that of the reference."""
    median = medians(seconds)
    return {name: each / median[reference] for name, each in median.items()}
