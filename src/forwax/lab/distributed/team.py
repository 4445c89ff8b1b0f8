"""The processes that train one run together, and what they tell each other.

A process that is alone tells itself, and no collective is made. All of a team must come to each of
these functions, in the same order: who does not come, the others wait for.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from forwax.lab.data import DataError
from forwax.lab.distributed.signals import Signals
from forwax.lab.flags import UsageError
from forwax.lab.keeping.disk import DiskError, refused

_T = TypeVar("_T")


@dataclass
class Team:
    """How many processes there are, which one this is, and whether all of them are ending."""

    count: int = 1
    index: int = 0
    ends_together: bool = False


TEAM = Team()
"""This process's team; `forwax.lab.distributed.join.joined` fills it in."""


def gathered(words: np.ndarray) -> np.ndarray:
    """Give the words of every process, [count, ...], where each has as many.

    >>> gathered(np.array([3, 1])).tolist()
    [[3, 1]]
    """
    if TEAM.count == 1:
        return words[None]
    return multihost_utils.process_allgather(words)


def from_first(make: Callable[[], _T]) -> _T:
    """Give what the first process makes, of what JSON can hold; its error ends all.

    >>> from_first(lambda: {"a": 1})
    {'a': 1}
    """
    if TEAM.count == 1:
        return make()
    with together():
        made = json.dumps(make() if TEAM.index == 0 else None)
    return json.loads(_texts(made)[0])


def in_turn(make: Callable[[], _T]) -> _T:
    """Let the first process make something, then the others: they find what it has fetched."""
    made = []
    for is_first in (True, False):
        with together():
            if is_first == (TEAM.index == 0):
                made.append(make())
    return made[0]


@contextmanager
def together() -> Iterator[None]:
    """Where it fails in one process it fails in all, with that one's error.

    Raises:
        UsageError: in place of another process's error.
        DiskError: the same, for an `OSError`.
    """
    if TEAM.count == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    texts = _texts(_sentence(error))
    told = [each for each in texts if each]
    if not told:
        return
    TEAM.ends_together = True
    kind, _, sentence = told[0].partition(" ")
    raise (DiskError if kind == "disk" else UsageError)(sentence) from error


def plan(size: int, is_due: bool, signals: Signals) -> tuple[int, bool, bool]:
    """Agree on the next block of steps, once a block.

    Args:
        size: how many steps the first process makes of it.
        is_due: whether, by its clock, a checkpoint is due.
        signals: of which one to any process stops all.

    Returns:
        Its size, whether to save before it, and whether to stop in its place.

    >>> plan(8, True, Signals())
    (8, True, False)
    """
    received = signals.received
    if TEAM.count == 1:
        return size, is_due, received is not None
    sizes, saves, numbers = gathered(
        np.array([size, is_due, received or 0], np.int32)
    ).T
    stops = numbers[numbers > 0]
    if len(stops):
        signals.received = int(stops[0])
    return int(sizes[0]), bool(saves[0]), bool(len(stops))


def shared(tree: Any, like: Any) -> Any:
    """Give the first process's arrays, in all their bits.

    Args:
        tree: its arrays; what other processes give is not looked at.
        like: arrays or shapes of the same structure.
    """

    def share(path: Any, leaf: Any) -> np.ndarray:
        content = np.zeros(leaf.size * leaf.dtype.itemsize, np.uint8)
        if TEAM.index == 0:
            content = np.ascontiguousarray(arrays[path]).reshape(-1).view(np.uint8)
        # bytes, since a sum of floats would lose the sign of zero
        told = multihost_utils.broadcast_one_to_all(content).astype(np.uint8)
        return told.view(leaf.dtype).reshape(leaf.shape)

    arrays = dict(jax.tree.leaves_with_path(tree))
    return jax.tree.map_with_path(share, like)


def process(index: int) -> str:
    """Name a process of the team.

    >>> process(0)
    'process 0 of 1'
    """
    return f"process {index} of {TEAM.count}"


def _texts(text: str) -> list[str]:
    """The text of every process."""
    content = text.encode()
    sizes = gathered(np.array([len(content)], np.int32))[:, 0]
    padded = np.frombuffer(content.ljust(sizes.max(initial=1), b"\0"), np.uint8)
    rows = gathered(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _sentence(error: Exception | None) -> str:
    """The kind of an error and its text; one that nobody expected shows its trace here."""
    if error is None:
        return ""
    if isinstance(error, OSError):
        return f"disk {process(TEAM.index)}: {refused(error)}"
    told = str(error)
    if not isinstance(error, UsageError | DataError):
        traceback.print_exception(error, file=sys.stderr)
        told = f"{type(error).__name__}: {error}"
    return f"usage {process(TEAM.index)}: {told}"
