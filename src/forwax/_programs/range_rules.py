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

from forwax._programs.bounds import (
    LARGEST_PRODUCT,
    MOST_KINDS,
    Bounds,
    Known,
    aligned,
    any_entry,
    anything,
    rounded,
    within,
)
from forwax._programs.links import Shape, runs


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
    operands: Sequence[Known]
    shapes: Sequence[Shape]
    out: Shape
    dtype: Any


RangeRule: TypeAlias = Callable[[Operation], Known]
"""Takes an operation to what is known of its result."""


def unchanged(at: Operation) -> Known:
    """The first operand's."""
    return at.operands[0]


def cast(at: Operation) -> Known:
    """Another dtype; rounding towards whole numbers is not followed."""
    if not jnp.issubdtype(at.dtype, jnp.inexact):
        return anything(at.out)
    (x,) = at.operands
    return Known(x.kinds, rounded(x.bounds))


def bounded(low: float, high: float) -> RangeRule:
    """A function with these bounds, whatever it is given."""

    def rule(at: Operation) -> Known:
        return within(low, high, at.out)

    return rule


def product_of_arrays(at: Operation) -> Known:
    """A dot or convolution: no larger than `LARGEST_PRODUCT`, by assumption."""
    if not jnp.issubdtype(at.dtype, jnp.floating):
        return anything(at.out)
    largest = float(jnp.finfo(at.dtype).max)
    most = min(LARGEST_PRODUCT, largest / 8)
    return within(-most, most, at.out)


# --- entry by entry ---


Entrywise: TypeAlias = Callable[..., Bounds]
"""Takes the bounds of operands, the same kinds of entries in each, to those of the result."""


def entrywise(rule: Entrywise, kind: Any = jnp.inexact) -> RangeRule:
    """The rule of an operation entry by entry, for results of one kind of dtype.

    Whole numbers wrap around, and of them logical operations take single bits.
    """

    def of_arrays(at: Operation) -> Known:
        if not jnp.issubdtype(at.dtype, kind):
            return anything(at.out)
        kinds, operands = aligned(at.operands)
        bounds = rounded(rule(*operands))
        if len(bounds.low) > MOST_KINDS:
            return within(bounds.low.min(), bounds.high.max(), at.out)
        return Known(kinds, bounds)

    return of_arrays


def add(x: Bounds, y: Bounds) -> Bounds:
    """The sum of two."""
    low = x.low + y.low
    high = x.high + y.high
    low = np.where(np.isnan(low), -np.inf, low)
    high = np.where(np.isnan(high), np.inf, high)
    # What is -inf stays so, or becomes NaN.
    for part in (x, y):
        high = np.where(part.high == -np.inf, -np.inf, high)
    return Bounds(low, high)


def sub(x: Bounds, y: Bounds) -> Bounds:
    """The difference of two."""
    return add(x, neg(y))


def neg(x: Bounds) -> Bounds:
    """The other sign."""
    return Bounds(-x.high, -x.low)


def mul(x: Bounds, y: Bounds) -> Bounds:
    """The product of two; 0 times anything is 0, for infinities would give NaN."""
    corners = np.stack(
        [
            x.low * y.low,
            x.low * y.high,
            x.high * y.low,
            x.high * y.high,
        ]
    )
    corners = np.where(np.isnan(corners), 0, corners)
    return Bounds(corners.min(0), corners.max(0))


def div(x: Bounds, y: Bounds) -> Bounds:
    """0 divided by anything, and what is divided by a known number."""
    is_known = (y.low == y.high) & np.isfinite(y.low)
    is_positive = is_known & (y.low > 0)
    by = np.where(is_positive, y.low, 1)
    low = np.where(is_positive, x.low / by, -np.inf)
    high = np.where(is_positive, x.high / by, np.inf)
    return Bounds(
        low=np.where(x.is_zero, 0, low),
        high=np.where(x.is_zero, 0, high),
    )


def maximum(x: Bounds, y: Bounds) -> Bounds:
    """The larger of two."""
    return Bounds(
        low=np.maximum(x.low, y.low),
        high=np.maximum(x.high, y.high),
    )


def minimum(x: Bounds, y: Bounds) -> Bounds:
    """The smaller of two."""
    return Bounds(
        low=np.minimum(x.low, y.low),
        high=np.minimum(x.high, y.high),
    )


def logical_and(x: Bounds, y: Bounds) -> Bounds:
    """Both of two booleans."""
    return minimum(_boolean(x), _boolean(y))


def logical_or(x: Bounds, y: Bounds) -> Bounds:
    """Either of two booleans."""
    return maximum(_boolean(x), _boolean(y))


def logical_not(x: Bounds) -> Bounds:
    """1 less a boolean."""
    x = _boolean(x)
    return Bounds(1 - x.high, 1 - x.low)


def _boolean(x: Bounds) -> Bounds:
    return Bounds(x.low.clip(0, 1), x.high.clip(0, 1))


def exp(base: float) -> RangeRule:
    """Powers of a base; 0 where even the largest is less than half the smallest number."""

    def rule(at: Operation) -> Known:
        # Narrow types are computed in a wider one first.
        is_double = at.dtype == np.float64
        wide = np.float64 if is_double else np.float32
        smallest = np.finfo(wide).smallest_subnormal
        underflow = math.log(smallest, base) - 2

        def power(x: Bounds) -> Bounds:
            highest = np.power(base, np.maximum(x.high, underflow))
            return Bounds(
                low=np.zeros_like(x.low),
                high=np.where(x.high < underflow, 0, highest),
            )

        return entrywise(power, jnp.floating)(at)

    return rule


def select_n(which: Bounds, *cases: Bounds) -> Bounds:
    """One of several, by number."""
    low = np.full_like(which.low, np.inf)
    high = np.full_like(which.low, -np.inf)
    for i, case in enumerate(cases):
        is_reached = which.high >= i
        possible = is_reached & (which.low <= i)
        lowest = np.where(possible, case.low, np.inf)
        highest = np.where(possible, case.high, -np.inf)
        low = np.minimum(low, lowest)
        high = np.maximum(high, highest)
    return Bounds(low, high)


# --- along axes ---


def reduce_max(at: Operation) -> Known:
    """The largest along axes, of the kinds that are there."""
    (x,) = at.operands
    axes = tuple(at.params["axes"])
    if 0 in at.shapes[0]:
        return anything(at.out)
    shape = np.any(x.kinds == 0, axes).shape
    low = np.full(shape, -np.inf)
    high = np.full(shape, -np.inf)
    for kind in range(x.num_kinds):
        is_there = np.any(x.kinds == kind, axes)
        lowest = np.maximum(low, x.bounds.low[kind])
        highest = np.maximum(high, x.bounds.high[kind])
        low = np.where(is_there, lowest, low)
        high = np.where(is_there, highest, high)
    pairs = np.stack([low.ravel(), high.ravel()])
    bounds, kinds = np.unique(pairs, axis=1, return_inverse=True)
    return Known(kinds.reshape(shape), Bounds(*bounds))


def reduce_sum(at: Operation) -> Known:
    """The sum along axes, of all rows alike."""
    (x,) = at.operands
    count = math.prod(at.shapes[0][axis] for axis in at.params["axes"])
    if count == 0:
        return within(0, 0, at.out)
    low = x.bounds.low.min() * count
    high = x.bounds.high.max() * count
    kinds = np.zeros((1,) * len(at.out), np.uint8)
    bounds = Bounds(np.array([low]), np.array([high]))
    return Known(kinds, rounded(bounds))


# --- entries that move ---


Move: TypeAlias = Callable[[Operation, np.ndarray], np.ndarray]
"""Moves the kinds of entries, whose axes may have length 1, as the operation does an array's."""


def moved(move: Move) -> RangeRule:
    """The rule of an operation that moves its first operand's entries."""

    def rule(at: Operation) -> Known:
        x = at.operands[0]
        return Known(move(at, x.kinds), x.bounds)

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


def hull(at: Operation) -> Known:
    """Entries of the first operand, wherever they go."""
    return any_entry(at.operands[0], at.out)


def concatenate(at: Operation) -> Known:
    """Several operands one after another."""
    axis = at.params["dimension"]
    low = np.concatenate([x.bounds.low for x in at.operands])
    high = np.concatenate([x.bounds.high for x in at.operands])
    if len(low) > MOST_KINDS:
        return within(low.min(), high.max(), at.out)
    lengths = [shape[axis] for shape in at.shapes]
    others = [np.delete(x.kinds.shape, axis) for x in at.operands]
    common = np.broadcast_shapes(*map(tuple, others))
    parts: list[np.ndarray] = []
    num_kinds = 0
    for x, length in zip(at.operands, lengths, strict=True):
        shape = (*common[:axis], length, *common[axis:])
        kinds = x.kinds.astype(np.int32) + num_kinds
        parts.append(np.broadcast_to(kinds, shape))
        num_kinds += x.num_kinds
    return Known(np.concatenate(parts, axis), Bounds(low, high))
