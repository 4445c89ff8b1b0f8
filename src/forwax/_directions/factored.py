"""A parameter's tangent as a product of two thin arrays, and what operations make of it without forming it.

The tangent of a variable is Σ_r left_r · right_r, elementwise, each factor with size 1 along axes
on which it does not depend. Moves of axes act on both factors; a dot or a convolution contracts one
of them and is then scaled by the other.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from forwax import _mesh
from forwax._directions.convolution import one_feature
from forwax._programs.primitives import MOVES
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


_UNCHANGED = {"copy", "name", "reduce_precision", "sharding_constraint"}


_VARY = "pvary"


_MOVES = MOVES | _UNCHANGED | {"slice", "dynamic_slice", _VARY}


def is_move(equation: Equation) -> bool:
    """Whether an operation only moves or casts the entries of its first operand, and their tangents with them."""
    cut = equation.name == "convert_element_type" and not jnp.issubdtype(
        equation.params["new_dtype"], jnp.inexact
    )
    return equation.name in _MOVES and not cut


def moved(
    equation: Equation,
    tangent: Factored,
    values: Sequence[Any],
    shape: Shape,
    out: Shape,
) -> Factored | None:
    """The tangent behind an operation that only moves entries; None when the operation is another or they would mix."""
    pairs = []
    for pair in tangent.pairs:
        found = [_moved(equation, factor, values, shape, out) for factor in pair]
        if any(x is None for x in found):
            return None
        pairs.append(tuple(found))
    return Factored(tuple(pairs))


def _moved(
    equation: Equation, factor: Array, values: Sequence[Any], shape: Shape, out: Shape
) -> Array | None:
    name, params = equation.name, equation.params
    if name in _UNCHANGED:
        return factor
    if name == _VARY:
        return _mesh.vary(factor, params["axes"])
    if name == "convert_element_type":
        return factor.astype(params["new_dtype"])
    if name == "transpose":
        return lax.transpose(factor, params["permutation"])
    if name == "squeeze":
        return lax.squeeze(factor, params["dimensions"])
    if name == "reshape" and params.get("dimensions") is None:
        return _reshaped(factor, shape, out)
    if name == "broadcast_in_dim":
        sizes = dict(zip(params["broadcast_dimensions"], factor.shape, strict=True))
        return factor.reshape([sizes.get(axis, 1) for axis in range(len(out))])
    if name == "slice":
        return _sliced(factor, params)
    if name == "dynamic_slice":
        kept = [n > 1 for n in factor.shape]
        starts = [
            start if keep else jnp.zeros_like(start)
            for start, keep in zip(values[1:], kept, strict=True)
        ]
        sizes = [n if keep else 1 for n, keep in zip(params["slice_sizes"], kept, strict=True)]
        return lax.dynamic_slice(factor, starts, sizes)
    return None


def _sliced(factor: Array, params: Any) -> Array:
    strides = params["strides"] or [1] * factor.ndim
    bounds = zip(
        params["start_indices"],
        params["limit_indices"],
        strides,
        factor.shape,
        strict=True,
    )
    return factor[tuple(slice(a, b, s) if n > 1 else slice(None) for a, b, s, n in bounds)]


def _reshaped(factor: Array, shape: Shape, out: Shape) -> Array | None:
    """A factor whose variable is reshaped, if it depends on all or none of the axes that are merged or cut together."""
    sizes: list[int] = []
    for old, new in _blocks(shape, out):
        own = [n for n in factor.shape[old] if n > 1]
        if not own:
            sizes += [1] * len(out[new])
        elif math.prod(own) == math.prod(shape[old]):
            sizes += out[new]
        else:
            return None
    return factor.reshape(sizes)


def _blocks(shape: Shape, out: Shape) -> list[tuple[slice, slice]]:
    """The smallest runs of axes of both shapes that hold equally many entries."""
    blocks, i, j = [], 0, 0
    while i < len(shape) or j < len(out):
        a, b = i, j
        left = right = 1
        while True:
            if left <= right and i < len(shape):
                left, i = left * shape[i], i + 1
            elif j < len(out):
                right, j = right * out[j], j + 1
            else:
                left, i = left * shape[i], i + 1
            if left == right or (i == len(shape) and j == len(out)):
                break
        blocks.append((slice(a, i), slice(b, j)))
    return blocks


def product(
    equation: Equation, position: int, tangent: Factored, values: Sequence[Any]
) -> Array | None:
    """The tangent of a dot or convolution whose operand `position` alone has a factored tangent; None if it is none."""
    if equation.name == "dot_general":
        contract = _dot_product
    elif equation.name == "conv_general_dilated" and position == 1:
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
        lax.transpose(outer, (*mixed, *free, *own)),
        range(len(shape) - len(own), len(shape)),
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
    if equation.primitive is not primitives.gather_p:
        return None
    numbers, sizes = (
        equation.params["dimension_numbers"],
        equation.params["slice_sizes"],
    )
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
        looked = primitives.gather_p.bind(rows, values[1], **params)
        shape = [1] * len(out)
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            shape[place] = rest.shape[axis]
        found = jnp.broadcast_to(looked * rest.reshape(shape), out)
        total = found if total is None else total + found
    return total
