"""The learning rate of each rule, found on the same budget: as many candidates and steps.

The first candidates are s and √10·s, where s is the suggested rate, which is the safe end. Each
further one goes √10 beyond the best rate where that lies at an edge, else into the wider of the two
gaps beside it. The choice is made by the loss on the validation part; a candidate that turns
non-finite loses.
"""

import math
from collections.abc import Callable

from forwax.lab.report import Json, Rows

Tried = list[tuple[float, float]]
"""Pairs of (rate, validation loss), the loss infinite where the run turned non-finite."""

FACTOR = math.sqrt(10)


def next_rate(tried: Tried, suggested: float) -> float:
    """Choose the next candidate.

    Args:
        tried: what the earlier ones gave.
        suggested: the suggested rate.

    >>> round(next_rate([(1.0, 0.5), (3.0, 0.2), (10.0, 0.4)], suggested=1.0), 2)
    5.48
    >>> round(next_rate([(1.0, 0.5), (3.0, 0.4), (10.0, 0.3)], suggested=1.0), 1)
    31.6
    """
    if len(tried) < 2:
        return suggested * FACTOR ** len(tried)
    rates = [rate for rate, _ in sorted(tried)]
    # neighbours are at most FACTOR apart, so that beyond an edge the gap is the widest
    rates = [rates[0] / FACTOR**2, *rates, rates[-1] * FACTOR**2]
    at = rates.index(best_rate(tried))
    below, best, above = rates[at - 1 : at + 2]
    # equal gaps differ in their last digits
    is_wider_above = above / best >= best / below * (1 - 1e-9)
    return math.sqrt(best * (above if is_wider_above else below))


def best_rate(tried: Tried) -> float:
    """Give the rate of the least loss; the smallest rate where several are equal.

    >>> best_rate([(1.0, 0.5), (3.0, float("inf"))])
    1.0
    """
    return min(tried, key=lambda pair: (pair[1], pair[0]))[0]


def search(
    suggested: float, count: int, candidate: Callable[[int, float], Json]
) -> Rows:
    """Try `count` rates.

    Args:
        suggested: the suggested rate.
        count: how many candidates.
        candidate: trains with the rate of the given number, or gives what an earlier sitting found:
            learning_rate, steps, and validation_loss, None where the run turned non-finite.

    Returns:
        Every candidate, in the order in which they were tried.
    """
    found: Rows = []
    for number in range(count):
        found.append(candidate(number, next_rate(pairs(found), suggested)))
    return found


def pairs(candidates: Rows) -> Tried:
    """Give (rate, validation loss) of each candidate, infinite where it turned non-finite."""
    found = ((each["learning_rate"], each["validation_loss"]) for each in candidates)
    return [(rate, math.inf if loss is None else loss) for rate, loss in found]


def edge_note(candidates: Rows) -> str | None:
    """Give one sentence where the choice is not bracketed, else None.

    >>> edge_note([{"learning_rate": 1.0, "validation_loss": None}])
    'no rate stayed finite'
    """
    if all(each["validation_loss"] is None for each in candidates):
        return "no rate stayed finite"
    tried = sorted(pairs(candidates))
    best = best_rate(tried)
    if best == tried[0][0]:
        return "the smallest rate tried was the best: a smaller one may be better still"
    if best == tried[-1][0]:
        return "the largest rate tried was the best: a larger one may be better still"
    return None
