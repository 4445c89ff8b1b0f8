"""How a value is tied to a followed axis, and what becomes of the tie when positions move."""

import dataclasses
import math
from typing import TypeAlias

import numpy as np

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factor:
    """An axis of a value of which each position changes one position of a followed axis alone.

    Position x changes nothing but position offset + (x // inner) % size.

    Attributes:
        axis: the value's axis.
        inner: how many neighbouring positions belong together.
        size: after how many such groups the pattern repeats.
        offset: where the first group lies.
    """

    axis: int
    inner: int = 1
    size: int = 1
    offset: int = 0

    def positions(self, length: int) -> np.ndarray:
        """The position on the followed axis for each position on an axis of this length."""
        groups = np.arange(length) // self.inner
        return self.offset + groups % self.size


Link: TypeAlias = Factor | None
"""How a value is tied to a followed axis; None when its coordinates may change all positions."""


def factor(axis: int, inner: int, size: int, offset: int, length: int) -> Factor:
    """A link with no more groups than the axis has."""
    num_groups = -(-length // inner)
    size = min(size, num_groups)
    if size == 1:  # all coordinates change one position: it holds whatever the axis
        return Factor(0, 1, 1, offset)
    return Factor(axis, inner, size, offset)


def moved(link: Factor, axis: int | None) -> Link:
    """The link of an operand that holds the same entries on another axis, or on none."""
    if axis is None:
        return None
    return dataclasses.replace(link, axis=axis)


def shifted(link: Factor, start: int, length: int, out: int) -> Link:
    """The link of an operand whose position `start` becomes the result's position 0.

    Args:
        link: the result's.
        start: negative where the operand begins inside the result.
        length: of the operand's axis.
        out: of the result's axis.
    """
    if start == 0 and length == out:
        return link
    if start % link.inner:  # groups must stay whole
        return None
    if link.inner * link.size < out:  # a pattern that repeats would need a phase
        return None
    num_groups = -(-length // link.inner)
    offset = link.offset - start // link.inner
    return factor(link.axis, link.inner, num_groups, offset, length)


def through_reshape(link: Factor, shape: Shape, out: Shape) -> Link:
    """The link of a value that was reshaped from `shape` to `out`: the flat position stays."""
    length = out[link.axis]
    pattern = link.inner * link.size
    is_outermost = math.prod(out[: link.axis]) == 1
    # in the flat order: from one group to the next, and until the pattern repeats
    behind = out[link.axis + 1 :]
    stride = link.inner * math.prod(behind)
    if length % pattern == 0:
        period = stride * link.size
    elif is_outermost and pattern >= length:
        period = None  # never: the flat position by itself
    else:
        return None
    place = _axis_of_stride(stride, shape)
    if place is None:
        return None
    axis, step = place
    # Each line along the axis must begin with the first group, unless there is but one line.
    line = step * shape[axis]
    is_single = math.prod(shape[:axis]) == 1
    begins_anew = period is not None and line % period == 0
    if not (is_single or begins_anew):
        return None
    if stride % step:
        return None
    inner = stride // step
    return factor(axis, inner, link.size, link.offset, shape[axis])


def _axis_of_stride(stride: int, shape: Shape) -> tuple[int, int] | None:
    """The axis on which so long a step of the flat order ends, and the step between neighbours."""
    step = 1
    for axis in reversed(range(len(shape))):
        if step <= stride < step * shape[axis]:
            return axis, step
        step *= shape[axis]
    return None
