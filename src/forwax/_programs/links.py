"""How a value is tied to a followed axis, and what becomes of the tie when positions move."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]

LONGEST = 1 << 22
"""An axis with more positions is not followed: a link lists them one by one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """Which positions of a followed axis a value's coordinates may change.

    Those at place x of one of the value's axes change nothing but the positions from first[x] to
    last[x], and nothing at all where last[x] < first[x].

    Attributes:
        axis: the value's axis; -1 for the steps of the outermost loop around it, -2 for those of
            the next one; None where the same holds for all coordinates.
        first: [length of the axis], or [1] without an axis.
        last: of the same shape.
        size: the length of the followed axis.
    """

    axis: int | None
    first: np.ndarray
    last: np.ndarray
    size: int

    def __eq__(self, other: Any) -> bool:
        if self is other:
            return True
        if not isinstance(other, Link):
            return NotImplemented
        if self.axis != other.axis or self.size != other.size:
            return False
        if not np.array_equal(self.first, other.first):
            return False
        return np.array_equal(self.last, other.last)

    def __hash__(self) -> int:
        first = self.first.tobytes()
        last = self.last.tobytes()
        return hash((self.axis, self.size, first, last))

    @property
    def length(self) -> int:
        """The length of the value's axis; 1 without an axis."""
        return len(self.first)

    @property
    def is_exact(self) -> bool:
        """Whether no coordinate changes more than one position."""
        return bool(np.all(self.last <= self.first))

    @property
    def is_kept(self) -> bool:
        """Whether the value's axis is the followed one: each position changes itself alone."""
        if self.axis is None or self.length != self.size:
            return False
        positions = np.arange(self.size)
        is_first = np.array_equal(self.first, positions)
        return is_first and np.array_equal(self.last, positions)

    @property
    def is_open(self) -> bool:
        """Whether every coordinate may change all positions, so that nothing is said."""
        return self.is_earlier and self.is_later

    @property
    def width(self) -> float:
        """How many positions a coordinate may change, on average."""
        widths = self.last - self.first + 1
        return float(np.mean(widths.clip(0)))

    @property
    def is_later(self) -> bool:
        """Whether a coordinate may change all positions from some place on."""
        return bool(np.all(self.last >= self.size - 1))

    @property
    def is_earlier(self) -> bool:
        """Whether a coordinate may change all positions up to some place."""
        return bool(np.all(self.first <= 0))

    @property
    def group(self) -> int:
        """How many neighbouring coordinates change the same positions."""
        moves = np.diff(self.first) | np.diff(self.last)
        num_groups = 1 + int(np.count_nonzero(moves))
        return self.length // num_groups

    def on(self, axis: int | None) -> "Link":
        """The same on another axis of a value; without one, what holds for all coordinates."""
        if axis is None:
            return self.joined()
        return dataclasses.replace(self, axis=axis)

    def joined(self) -> "Link":
        """What holds for all coordinates."""
        first = self.first.min(keepdims=True)
        last = self.last.max(keepdims=True)
        return Link(None, first, last, self.size)

    def with_windows(
        self,
        first: np.ndarray,
        last: np.ndarray,
    ) -> "Link":
        """Other windows on the same axis, which may have another length."""
        return Link(self.axis, first, last, self.size)

    def pulled(
        self, of_operand: np.ndarray, of_result: np.ndarray, length: int
    ) -> "Link":
        """The link of an operand, on an axis of this length, of which some positions are read.

        Position of_operand[i] enters the result's position of_result[i], for each i.
        """
        first = np.full(length, self.size)
        last = np.full(length, -1)
        np.minimum.at(first, of_operand, self.first[of_result])
        np.maximum.at(last, of_operand, self.last[of_result])
        return self.with_windows(first, last)

    def through(
        self,
        mask: np.ndarray,
        axis: int,
    ) -> "Link":
        """The link of an operand's axis: mask[x, y], x on this link's axis, says y enters x."""
        enters = np.broadcast_to(mask, (self.length, mask.shape[1]))
        is_used = enters.any(0)
        if _is_monotone(self.first) and _is_monotone(self.last):
            # Where windows move one way, those of the first and the last place hold the others.
            start = np.argmax(enters, axis=0)
            stop = self.length - 1 - np.argmax(enters[::-1], axis=0)
            first = np.minimum(self.first[start], self.first[stop])
            last = np.maximum(self.last[start], self.last[stop])
        else:
            first = np.where(enters, self.first[:, None], self.size).min(0)
            last = np.where(enters, self.last[:, None], -1).max(0)
        first = np.where(is_used, first, self.size)
        last = np.where(is_used, last, -1)
        return Link(axis, first, last, self.size)

    def either(self, other: "Link") -> "Link | None":
        """What holds of a value with two uses; None on two different axes."""
        axes = {self.axis, other.axis} - {None}
        if len(axes) > 1:
            return None
        if self is other:
            return self
        axis = axes.pop() if axes else None
        first = np.minimum(self.first, other.first)
        last = np.maximum(self.last, other.last)
        return Link(axis, first, last, self.size)

    def both(self, other: "Link") -> "Link":
        """What holds if two links along the same axis do."""
        first = np.maximum(self.first, other.first)
        last = np.minimum(self.last, other.last)
        return self.with_windows(first, last)

    def overlap(self, other: "Link") -> float:
        """The share of pairs of coordinates, one of each link, that change a position together."""
        first, last = self._windows()
        starts, ends = other._windows()
        # Of the other's windows those that begin in time, less those that ended before.
        begun = np.searchsorted(np.sort(starts), last, side="right")
        ended = np.searchsorted(np.sort(ends), first, side="left")
        num_pairs = self.length * other.length
        return float(np.sum(begun - ended)) / num_pairs

    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last positions of the windows that hold any."""
        first = self.first.clip(0)
        last = self.last.clip(max=self.size - 1)
        holds_any = first <= last
        return first[holds_any], last[holds_any]


def _is_monotone(positions: np.ndarray) -> bool:
    steps = np.diff(positions)
    return bool(np.all(steps >= 0) or np.all(steps <= 0))


def along(axis: int, length: int) -> Link:
    """The link of the followed axis itself."""
    positions = np.arange(length)
    return Link(axis, positions, positions, length)


def through_reshape(
    link: Link,
    shape: Shape,
    out: Shape,
) -> Link:
    """The link of a value that was reshaped from `shape` to `out`: the flat position stays."""
    assert link.axis is not None
    pairs = [pair for pair in runs(shape, out) if link.axis in pair[1]]
    if not pairs:
        return link.joined()
    ((own, other),) = pairs
    entries = [out[axis] for axis in other]
    if not own or math.prod(entries) > LONGEST:
        return link.joined()
    place = [1] * len(other)
    place[other.index(link.axis)] = link.length
    lengths = [shape[axis] for axis in own]

    def reshaped(windows: np.ndarray) -> np.ndarray:
        written_out = np.broadcast_to(windows.reshape(place), entries)
        return written_out.reshape(lengths)

    first = reshaped(link.first)
    last = reshaped(link.last)
    links: list[Link] = []
    for i, axis in enumerate(own):
        others = tuple(j for j in range(len(own)) if j != i)
        of_axis = Link(axis, first.min(others), last.max(others), link.size)
        links.append(of_axis)
    return min(links, key=lambda link: link.width)


def runs(shape: Shape, out: Shape) -> Iterator[tuple[range, range]]:
    """The axes of two shapes of one flat order, in pairs of runs that hold the same entries."""
    if 0 in shape:
        return
    i = j = 0
    while i < len(shape) or j < len(out):
        start, other_start = i, j
        entries = shape[i] if i < len(shape) else 1
        other_entries = out[j] if j < len(out) else 1
        i, j = i + 1, j + 1
        while entries != other_entries:
            if entries < other_entries:
                entries *= shape[i]
                i += 1
            else:
                other_entries *= out[j]
                j += 1
        yield range(start, min(i, len(shape))), range(other_start, min(j, len(out)))
