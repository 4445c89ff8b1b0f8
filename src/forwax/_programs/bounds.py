"""What is known of arrays: their entries lie between bounds, of which there are few kinds."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from forwax._programs.links import Shape

LARGEST_PRODUCT = 1e8
"""A dot or convolution is taken to lie within this; within an eighth of what a narrow type holds.

A finite constant in place of -inf, such as -1e30, is below all scores if scores are no larger.
"""

_WHOLE = 256
"""Whole numbers up to this are exact in every dtype that models compute in."""

_ROUNDING = 1 / 64
"""More than any of these dtypes rounds by in one operation, relative to the result."""

MOST_KINDS = 256
"""Entries with more kinds of bounds than this are told apart no more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """Between what the entries of one kind lie, for each kind.

    Attributes:
        low: [kinds], float64.
        high: [kinds].
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def is_zero(self) -> np.ndarray:
        """Which kinds are 0."""
        return (self.low == 0) & (self.high == 0)

    def at(self, kinds: np.ndarray) -> "Bounds":
        """Those of some kinds, in this order."""
        return Bounds(self.low[kinds], self.high[kinds])


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known of an array: a mask, say, has two kinds of entries, and most have one.

    Attributes:
        kinds: the kind of each entry; each axis has the array's length, or 1 where all are alike.
        bounds: of each kind.
        value: the array itself, where it is known.
    """

    kinds: np.ndarray
    bounds: Bounds
    value: np.ndarray | None = None

    @property
    def num_kinds(self) -> int:
        """How many kinds there are."""
        return len(self.bounds.low)


def within(low: float, high: float, shape: Shape) -> Known:
    """The same bounds for all entries of an array of this shape."""
    kinds = np.zeros((1,) * len(shape), np.uint8)
    return Known(kinds, Bounds(np.array([low]), np.array([high])))


def anything(shape: Shape) -> Known:
    """What is true of every array."""
    return within(-np.inf, np.inf, shape)


_EDGES = np.array([-np.inf, -LARGEST_PRODUCT, 0, np.nextafter(0, 1), LARGEST_PRODUCT])


def of_array(value: np.ndarray) -> Known:
    """What is known of an array that is there, with entries and without NaN."""
    distinct = value
    for axis in range(value.ndim):
        start = distinct.take([0], axis)
        repeated = np.broadcast_to(start, distinct.shape)
        if np.array_equal(repeated, distinct):
            distinct = start
    if distinct.dtype == np.bool_:
        tables = np.array([0.0, 1.0])
        return Known(distinct.view(np.uint8), Bounds(tables, tables), value)
    numbers, kinds = np.unique(distinct, return_inverse=True)
    numbers = numbers.astype(np.float64)
    kinds = kinds.reshape(distinct.shape)
    if len(numbers) <= MOST_KINDS:
        return Known(kinds.astype(np.uint8), Bounds(numbers, numbers), value)
    # Too many: by size alone, 0 and -inf apart.
    sizes = np.searchsorted(_EDGES, numbers, side="right")
    _, starts, groups = np.unique(sizes, return_index=True, return_inverse=True)
    ends = np.append(starts[1:], len(numbers)) - 1
    bounds = Bounds(numbers[starts], numbers[ends])
    return Known(groups[kinds].astype(np.uint8), bounds, value)


def rounded(bounds: Bounds) -> Bounds:
    """Bounds that hold in whatever dtype numbers within these are computed.

    So a kind with both bounds equal is exact: small and whole, infinite, or never computed with.
    """
    return Bounds(
        low=bounds.low - _error(bounds.low),
        high=bounds.high + _error(bounds.high),
    )


def _error(x: np.ndarray) -> np.ndarray:
    """How far rounding may have moved numbers."""
    size = np.abs(x)
    is_whole = x == np.round(x)
    is_small = size <= _WHOLE
    is_exact = (is_whole & is_small) | np.isinf(x)
    return np.where(is_exact, 0, size * _ROUNDING)


def any_entry(x: Known, shape: Shape) -> Known:
    """An array of this shape whose entries are some of another's."""
    return within(x.bounds.low.min(), x.bounds.high.max(), shape)


def aligned(arrays: Sequence[Known]) -> tuple[np.ndarray, list[Bounds]]:
    """Kinds of entries that all operands share, and each operand's bounds of them."""
    first, *others = arrays
    kinds = first.kinds
    bounds = [first.bounds]
    for other in others:
        if other.kinds is kinds:
            bounds.append(other.bounds)
            continue
        kinds, own, theirs = _pairs_of_kinds(kinds, len(bounds[0].low), other)
        bounds = [x.at(own) for x in bounds]
        bounds.append(other.bounds.at(theirs))
    # Scalars stand beside arrays.
    rank = max(x.kinds.ndim for x in arrays)
    if kinds.ndim < rank:
        kinds = kinds.reshape((1,) * rank)
    return kinds, bounds


def _pairs_of_kinds(
    kinds: np.ndarray, num_kinds: int, other: Known
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kinds of entries of two arrays together, and of which kind they are in each."""
    num_others = other.num_kinds
    if num_others == 1:
        own = np.arange(num_kinds)
        return kinds, own, np.zeros_like(own)
    if num_kinds == 1:
        theirs = np.arange(num_others)
        return other.kinds, np.zeros_like(theirs), theirs
    pairs = kinds.astype(np.int32) * num_others + other.kinds
    counts = np.bincount(pairs.ravel())
    used = np.flatnonzero(counts)
    names = np.zeros(len(counts), np.int32)
    names[used] = np.arange(len(used))
    return names[pairs], used // num_others, used % num_others
