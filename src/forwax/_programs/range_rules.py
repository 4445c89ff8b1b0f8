"""Between what the entries of a result lie, from where those of the operands do.

This is what makes causal masks known: `exp(where(mask, s, -inf) - max)` lies between 0 and 0 where
the mask is off. The entries are those of real arrays without NaN, which would be in the gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from forwax._programs.links import Shape, runs

LARGEST_PRODUCT = 1e8
"""A dot or convolution is taken to lie within this; within an eighth of what a narrow type holds.

A finite constant in place of -inf, such as -1e30, is below all scores if scores are no larger.
"""

_WHOLE = 256
"""Whole numbers up to this are exact in every dtype that models compute in."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of an array's entries.

    Attributes:
        low: float64; each axis has the array's length, or 1 where the same holds all along.
        high: of the same rank.
        value: the array itself, where it is known.
    """

    low: np.ndarray
    high: np.ndarray
    value: np.ndarray | None = None

    @property
    def is_zero(self) -> np.ndarray:
        """Where the entries are 0."""
        return (self.low == 0) & (self.high == 0)


def within(low: float, high: float, shape: Shape) -> Bounds:
    """The same bounds for all entries of an array of this shape."""
    of_each = (1,) * len(shape)
    return Bounds(
        low=np.full(of_each, low),
        high=np.full(of_each, high),
    )


def anything(shape: Shape) -> Bounds:
    """What is true of every array."""
    return within(-np.inf, np.inf, shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation on ranges.

    Attributes:
        params: the operation's parameters.
        operands: what is known of them.
        shapes: the operands' shapes.
        out: the result's shape.
        dtype: the result's.
    """

    params: dict[str, Any]
    operands: Sequence[Bounds]
    shapes: Sequence[Shape]
    out: Shape
    dtype: Any


RangeRule: TypeAlias = Callable[[Operation], Bounds]
"""Takes an operation to the range of its result."""


def unchanged(at: Operation) -> Bounds:
    """The first operand's."""
    return at.operands[0]


def cast(at: Operation) -> Bounds:
    """Another dtype; rounding towards whole numbers is not followed."""
    return of_floats(unchanged)(at)


def bounded(low: float, high: float) -> RangeRule:
    """A function with these bounds, whatever it is given."""

    def rule(at: Operation) -> Bounds:
        return within(low, high, at.out)

    return rule


def product_of_arrays(at: Operation) -> Bounds:
    """A dot or convolution: no larger than `LARGEST_PRODUCT`, by assumption."""
    if not jnp.issubdtype(at.dtype, jnp.floating):
        return anything(at.out)
    largest = float(jnp.finfo(at.dtype).max)
    most = min(LARGEST_PRODUCT, largest / 8)
    return within(-most, most, at.out)


# --- entry by entry ---


def of_floats(rule: RangeRule) -> RangeRule:
    """A rule that whole numbers break, which wrap around."""

    def of_numbers(at: Operation) -> Bounds:
        if not jnp.issubdtype(at.dtype, jnp.inexact):
            return anything(at.out)
        return rule(at)

    return of_numbers


@of_floats
def add(at: Operation) -> Bounds:
    """The sum of two."""
    x, y = at.operands
    return _sum(x, y)


@of_floats
def sub(at: Operation) -> Bounds:
    """The difference of two."""
    x, y = at.operands
    return _sum(x, _negative(y))


@of_floats
def neg(at: Operation) -> Bounds:
    """The other sign."""
    (x,) = at.operands
    return _negative(x)


def _negative(x: Bounds) -> Bounds:
    return Bounds(-x.high, -x.low)


def _sum(x: Bounds, y: Bounds) -> Bounds:
    low = x.low + y.low
    high = x.high + y.high
    # What is -inf stays so, or becomes NaN.
    is_lowest = (x.high == -np.inf) | (y.high == -np.inf)
    low = np.where(np.isnan(low), -np.inf, low)
    high = np.where(np.isnan(high), np.inf, high)
    high = np.where(is_lowest, -np.inf, high)
    # Rounding may leave something where numbers cancel, unless they are small and whole.
    cancels = (low == 0) & (high == 0) & ~(x.is_zero & y.is_zero)
    is_exact = (x.low == np.round(x.low)) & (np.abs(x.low) <= _WHOLE)
    high = np.where(cancels & ~is_exact, np.inf, high)
    return Bounds(low, high)


@of_floats
def mul(at: Operation) -> Bounds:
    """The product of two; 0 times anything is 0, for infinities would give NaN."""
    x, y = at.operands
    corners = [a * b for a in (x.low, x.high) for b in (y.low, y.high)]
    corners = np.stack(np.broadcast_arrays(*corners))
    corners = np.where(np.isnan(corners), 0, corners)
    return Bounds(corners.min(0), corners.max(0))


@of_floats
def div(at: Operation) -> Bounds:
    """0 divided by anything, and what is divided by a known number."""
    x, y = at.operands
    is_positive = (y.low == y.high) & (y.low > 0) & np.isfinite(y.low)
    by = np.where(is_positive, y.low, 1)
    low = np.where(is_positive, x.low / by, -np.inf)
    high = np.where(is_positive, x.high / by, np.inf)
    return Bounds(
        low=np.where(x.is_zero, 0, low),
        high=np.where(x.is_zero, 0, high),
    )


def maximum(at: Operation) -> Bounds:
    """The larger of two; either, of booleans."""
    return _by_bounds(at, np.maximum)


def minimum(at: Operation) -> Bounds:
    """The smaller of two; both, of booleans."""
    return _by_bounds(at, np.minimum)


def _by_bounds(at: Operation, of: Callable[..., np.ndarray]) -> Bounds:
    x, y = at.operands
    return Bounds(of(x.low, y.low), of(x.high, y.high))


def of_booleans(rule: RangeRule) -> RangeRule:
    """A rule that holds for booleans alone: of integers these operations take single bits."""

    def of_bits(at: Operation) -> Bounds:
        if at.dtype != np.bool_:
            return anything(at.out)
        known = rule(at)
        return Bounds(known.low.clip(0, 1), known.high.clip(0, 1))

    return of_bits


def logical_not(at: Operation) -> Bounds:
    """1 less a boolean."""
    (x,) = at.operands
    return Bounds(1 - x.high, 1 - x.low)


def exp(base: float) -> RangeRule:
    """Powers of a base; 0 where even the largest is less than half the smallest number."""

    def rule(at: Operation) -> Bounds:
        if not jnp.issubdtype(at.dtype, jnp.floating):
            return anything(at.out)
        # Narrow types are computed in a wider one first.
        is_double = jnp.finfo(at.dtype).bits == 64
        smallest = np.finfo(np.float64 if is_double else np.float32).smallest_subnormal
        underflow = math.log(smallest, base) - 2

        (x,) = at.operands
        highest = np.power(base, np.maximum(x.high, underflow))
        return Bounds(
            low=np.zeros_like(x.low),
            high=np.where(x.high < underflow, 0, highest),
        )

    return rule


def select_n(at: Operation) -> Bounds:
    """One of several, by number."""
    which, *cases = at.operands
    low, high = np.inf, -np.inf
    for i, case in enumerate(cases):
        possible = (which.low <= i) & (which.high >= i)
        lowest = np.where(possible, case.low, np.inf)
        highest = np.where(possible, case.high, -np.inf)
        low = np.minimum(low, lowest)
        high = np.maximum(high, highest)
    return Bounds(np.asarray(low), np.asarray(high))


# --- along axes ---


def reduce_max(at: Operation) -> Bounds:
    """The largest along axes."""
    (x,) = at.operands
    axes = tuple(at.params["axes"])
    return Bounds(
        low=x.low.max(axes, initial=-np.inf),
        high=x.high.max(axes, initial=-np.inf),
    )


def reduce_sum(at: Operation) -> Bounds:
    """The sum along axes."""
    (x,) = at.operands
    axes = tuple(at.params["axes"])
    count = math.prod(at.shapes[0][axis] for axis in axes)
    if count == 0:
        return within(0, 0, at.out)
    low = x.low.min(axes) * count
    high = x.high.max(axes) * count
    return Bounds(low, high)


# --- entries that move ---


Move: TypeAlias = Callable[[Operation, np.ndarray], np.ndarray]
"""Moves the entries of bounds, whose axes may have length 1, as the operation does an array's."""


def moved(move: Move) -> RangeRule:
    """The rule of an operation that moves its first operand's entries."""

    def rule(at: Operation) -> Bounds:
        x = at.operands[0]
        return Bounds(move(at, x.low), move(at, x.high))

    return rule


def transpose(at: Operation, x: np.ndarray) -> np.ndarray:
    """Axes in another order."""
    return x.transpose(at.params["permutation"])


def squeeze(at: Operation, x: np.ndarray) -> np.ndarray:
    """Axes of size 1 go."""
    return x.squeeze(tuple(at.params["dimensions"]))


def broadcast_in_dim(at: Operation, x: np.ndarray) -> np.ndarray:
    """New axes, and others repeated."""
    shape = [1] * len(at.out)
    for axis, length in zip(at.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = length
    return x.reshape(shape)


def reshape(at: Operation, x: np.ndarray) -> np.ndarray:
    """The flat position stays: what differs along a run of axes is written out along it."""
    shape = at.shapes[0]
    full, result = [1] * len(shape), [1] * len(at.out)
    for own, other in runs(shape, at.out):
        if any(x.shape[axis] > 1 for axis in own):
            for axis in own:
                full[axis] = shape[axis]
            for axis in other:
                result[axis] = at.out[axis]
    return np.broadcast_to(x, full).reshape(result)


def rev(at: Operation, x: np.ndarray) -> np.ndarray:
    """Some axes backwards."""
    return np.flip(x, at.params["dimensions"])


def slice_(at: Operation, x: np.ndarray) -> np.ndarray:
    """A window."""
    params = at.params
    strides = params["strides"] or (1,) * x.ndim
    windows: list[slice] = []
    for axis, length in enumerate(x.shape):
        start = params["start_indices"][axis]
        stop = params["limit_indices"][axis]
        is_constant = length == 1
        window = slice(None) if is_constant else slice(start, stop, strides[axis])
        windows.append(window)
    return x[tuple(windows)]


def hull(at: Operation) -> Bounds:
    """Entries of the first operand, wherever they go."""
    x = at.operands[0]
    low = x.low.min(initial=np.inf)
    high = x.high.max(initial=-np.inf)
    return within(low, high, at.out)


def concatenate(at: Operation) -> Bounds:
    """Several operands one after another."""
    axis = at.params["dimension"]

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        others = [_without(x, axis) for x in parts]
        shape = list(np.broadcast_shapes(*others))
        whole: list[np.ndarray] = []
        for part, of_operand in zip(parts, at.shapes, strict=True):
            shape[axis] = of_operand[axis]
            whole.append(np.broadcast_to(part, shape))
        return np.concatenate(whole, axis)

    lows = [x.low for x in at.operands]
    highs = [x.high for x in at.operands]
    return Bounds(joined(lows), joined(highs))


def _without(x: np.ndarray, axis: int) -> Shape:
    """A shape in which one axis has length 1."""
    return (*x.shape[:axis], 1, *x.shape[axis + 1 :])
