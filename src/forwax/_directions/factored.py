"""A parameter's tangent as a product of two thin arrays, and what operations make of it without forming it.

The tangent of a variable is Σ_r left_r · right_r, elementwise, each factor with size 1 along axes
on which it does not depend. Moves of axes act on both factors; a dot or a convolution contracts one
of them and is then scaled by the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from forwax._directions.convolution import one_feature
from forwax._programs.moves import Move
from forwax._programs.program import Equation

Pair: TypeAlias = tuple[Array, Array]


def ordered(
    left: Array, right: Array, contracted: Sequence[int], free: Sequence[int]
) -> Pair | None:
    """The factor on the contracted axes, and the other, which must be one on them."""

    def depends(x: Array, axes: Sequence[int]) -> bool:
        return any(x.shape[axis] > 1 for axis in axes)

    for inner, outer in ((left, right), (right, left)):
        if not depends(outer, contracted) and not depends(inner, free):
            return inner, outer
    return None


def convolution(
    equation: Equation, position: int, left: Array, right: Array, values: Sequence[Any]
) -> Array | None:
    """The tangent of a convolution whose kernel's tangent is left · right; None where it must be formed."""
    params = equation.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers, kernel = params["dimension_numbers"], values[1]
    out_axis = numbers.rhs_spec[0]
    own = [axis for axis in range(kernel.ndim) if axis != out_axis]
    pair = ordered(left, right, own, [out_axis])
    if pair is None:
        return None
    inner, outer = pair
    inner = jnp.broadcast_to(
        inner, [1 if axis == out_axis else n for axis, n in enumerate(kernel.shape)]
    )
    x = lax.stop_gradient(values[0])
    thin = one_feature(x, inner, outer.size, params)
    thin = equation.primitive.bind(x, inner, **params) if thin is None else thin
    shape = [1] * thin.ndim
    shape[numbers.out_spec[1]] = outer.size
    return thin * outer.reshape(shape).astype(thin.dtype)


Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The tangent of a variable.

    Attributes:
        pairs: of factors, each of the variable's rank.
    """

    pairs: tuple[Pair, ...]

    def dense(self, shape: Shape) -> Array:
        """The tangent itself."""
        total = sum(
            (left * right for left, right in self.pairs[1:]),
            start=self.pairs[0][0] * self.pairs[0][1],
        )
        return jnp.broadcast_to(total, shape)


def is_move(equation: Equation) -> bool:
    """Whether an operation only moves or casts the entries of its first operand, and their tangents with them."""
    facts = equation.facts
    cut = facts.casts and not jnp.issubdtype(equation.params["new_dtype"], jnp.inexact)
    return facts.move_of_factors is not None and not cut


def moved(
    equation: Equation, tangent: Factored, values: Sequence[Any], shape: Shape, out: Shape
) -> Factored | None:
    """The tangent behind an operation that only moves entries; None when the operation is another or they would mix."""
    rule = equation.facts.move_of_factors
    if rule is None:
        return None
    move = Move(equation.params, values, shape, out)
    pairs = []
    for pair in tangent.pairs:
        left, right = (rule(move, factor) for factor in pair)
        if left is None or right is None:
            return None
        pairs.append((left, right))
    return Factored(tuple(pairs))


def product(
    equation: Equation, position: int, tangent: Factored, values: Sequence[Any]
) -> Array | None:
    """The tangent of a dot or convolution whose operand `position` alone has a factored tangent; None if it is none."""
    if equation.facts.is_dot:
        contract = _dot_product
    elif equation.facts.is_convolution and position == 1:
        contract = convolution
    else:
        return None
    total = None
    for left, right in tangent.pairs:
        found = contract(equation, position, left, right, values)
        if found is None:
            return None
        total = found if total is None else total + found
    return total


def _dot_product(
    equation: Equation, position: int, left: Array, right: Array, values: Sequence[Any]
) -> Array | None:
    contracted, batch = equation.params["dimension_numbers"]
    other = lax.stop_gradient(values[1 - position])
    shape, own, mixed = values[position].shape, contracted[position], batch[position]
    free = [axis for axis in range(len(shape)) if axis not in own and axis not in mixed]
    pair = ordered(left, right, own, free)
    if pair is None:
        return None
    inner, outer = pair
    inner = jnp.broadcast_to(inner, [1 if axis in free else n for axis, n in enumerate(shape)])
    inner = lax.squeeze(inner, free)
    place = {
        axis: i for i, axis in enumerate(axis for axis in range(len(shape)) if axis not in free)
    }
    mine = (tuple(place[a] for a in own), tuple(place[a] for a in mixed))
    theirs = (contracted[1 - position], batch[1 - position])
    numbers = tuple(x if position == 0 else x[::-1] for x in zip(mine, theirs, strict=True))
    operands = (inner, other) if position == 0 else (other, inner)
    params = {**equation.params, "dimension_numbers": numbers}
    thin = equation.primitive.bind(*operands, **params)
    rest = thin.ndim - len(mixed)
    outer = lax.squeeze(
        lax.transpose(outer, (*mixed, *free, *own)), range(len(shape) - len(own), len(shape))
    )
    if position == 0:  # result axes: batch, mine, theirs
        thin = jnp.expand_dims(thin, range(len(mixed), len(mixed) + len(free)))
        outer = jnp.expand_dims(outer, range(outer.ndim, outer.ndim + rest))
    else:
        thin = jnp.expand_dims(thin, range(thin.ndim, thin.ndim + len(free)))
        outer = jnp.expand_dims(outer, range(len(mixed), len(mixed) + rest))
    return thin * outer.astype(thin.dtype)


def look_up(
    equation: Equation, tangent: Factored, values: Sequence[Any], out: Shape
) -> Array | None:
    """The tangent of a look-up of rows: one factor is looked up, the other, the same for all rows, is not."""
    if not equation.facts.looks_up:
        return None
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if numbers.operand_batching_dims:
        return None
    indexed = numbers.start_index_map
    kept = [axis for axis in range(len(sizes)) if axis not in numbers.collapsed_slice_dims]
    total = None
    for left, right in tangent.pairs:
        pair = ordered(left, right, indexed, [])
        if pair is None:
            return None
        rows, rest = pair
        if any(rows.shape[axis] != values[0].shape[axis] for axis in indexed):
            return None
        own = tuple(
            n if axis in indexed else min(n, rows.shape[axis]) for axis, n in enumerate(sizes)
        )
        params = {
            **equation.params,
            "slice_sizes": own,
            "fill_value": 0,
        }  # a row that is not there has no tangent
        looked = equation.primitive.bind(rows, values[1], **params)
        shape = [1] * len(out)
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            shape[place] = rest.shape[axis]
        found = jnp.broadcast_to(looked * rest.reshape(shape), out)
        total = found if total is None else total + found
    return total
