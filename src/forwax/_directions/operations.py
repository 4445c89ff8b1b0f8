"""What moves, dots, convolutions and look-ups make of a tangent in factors, without forming it."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import primitives

from forwax import _mesh
from forwax._directions.add import Pair
from forwax._directions.convolution import one_feature
from forwax._directions.direction import Shape
from forwax._directions.factored import Factored
from forwax._programs.primitives import MOVES
from forwax._programs.program import Equation

_UNCHANGED = {"copy", "name", "reduce_precision", "sharding_constraint"}


_VARY = "pvary"


_MOVES = MOVES | _UNCHANGED | {"slice", "dynamic_slice", _VARY}


def is_move(equation: Equation) -> bool:
    """Whether an operation only moves or casts the entries of its first operand.

    Then the tangents move with them.
    """
    if equation.name == "convert_element_type":
        return bool(jnp.issubdtype(equation.params["new_dtype"], jnp.inexact))
    return equation.name in _MOVES


def moved(
    equation: Equation, tangent: Factored, values: Sequence[Any], shape: Shape, out: Shape
) -> Factored | None:
    """The tangent behind a move from one shape to another; None where the factors would mix."""
    pairs: list[Pair] = []
    for left, right in tangent.pairs:
        new_left = _moved(equation, left, values, shape, out)
        new_right = _moved(equation, right, values, shape, out)
        if new_left is None or new_right is None:
            return None
        pairs.append((new_left, new_right))
    return Factored.of(pairs)


def _moved(
    equation: Equation, factor: Array, values: Sequence[Any], shape: Shape, out: Shape
) -> Array | None:
    name = equation.name
    params = equation.params
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
        return _sliced_anywhere(factor, params, values[1:])
    return None


def _sliced(factor: Array, params: Any) -> Array:
    strides = params["strides"] or [1] * factor.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    cuts = [slice(*bound) for bound in bounds]
    cuts = [cut if n > 1 else slice(None) for cut, n in zip(cuts, factor.shape, strict=True)]
    return factor[tuple(cuts)]


def _sliced_anywhere(factor: Array, params: Any, starts: Sequence[Any]) -> Array:
    depends = [n > 1 for n in factor.shape]
    starts = [
        start if own else jnp.zeros_like(start) for start, own in zip(starts, depends, strict=True)
    ]
    sizes = [n if own else 1 for n, own in zip(params["slice_sizes"], depends, strict=True)]
    return lax.dynamic_slice(factor, starts, sizes)


def _reshaped(factor: Array, shape: Shape, out: Shape) -> Array | None:
    """A factor whose variable is reshaped.

    It must depend on all or none of the axes that are merged or cut together.
    """
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
    blocks: list[tuple[slice, slice]] = []
    i = 0
    j = 0
    while i < len(shape) or j < len(out):
        first = (i, j)
        left = 1
        right = 1
        while True:
            takes_left = i < len(shape) and (left <= right or j == len(out))
            if takes_left:
                left *= shape[i]
                i += 1
            else:
                right *= out[j]
                j += 1
            if left == right or (i == len(shape) and j == len(out)):
                break
        blocks.append((slice(first[0], i), slice(first[1], j)))
    return blocks


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


def product(
    equation: Equation, position: int, tangent: Factored, values: Sequence[Any], out: Shape
) -> Array | None:
    """The tangent of a dot, convolution or look-up of which one operand has a factored tangent.

    Args:
        equation: the operation.
        position: which operand it is; no other has a tangent in factors.
        tangent: the operand's.
        values: of all operands.
        out: the shape of the result.

    Returns:
        None where the tangent must be formed.
    """
    if equation.name == "dot_general":
        through = _dot_product
    elif equation.name == "conv_general_dilated" and position == 1:
        through = _convolution
    elif equation.primitive is primitives.gather_p and position == 0:
        through = _look_up
    else:
        return None
    total = None
    for left, right in tangent.pairs:
        term = through(equation, position, left, right, values, out)
        if term is None:
            return None
        total = term if total is None else total + term
    return total


def _dot_product(
    equation: Equation,
    position: int,
    left: Array,
    right: Array,
    values: Sequence[Any],
    out: Shape,
) -> Array | None:
    contracted, batch = equation.params["dimension_numbers"]
    own = contracted[position]
    mixed = batch[position]
    rank = len(values[position].shape)
    free = [axis for axis in range(rank) if axis not in own and axis not in mixed]
    pair = ordered(left, right, own, free)
    if pair is None:
        return None
    inner, outer = pair
    thin = _thin_dot(equation, position, inner, free, values)  # [*mixed, *theirs]
    outer = lax.transpose(outer, (*mixed, *free, *own))
    outer = lax.squeeze(outer, range(rank - len(own), rank))  # [*mixed, *free]
    num_theirs = thin.ndim - len(mixed)
    behind_mixed = range(len(mixed), len(mixed) + (len(free) if position == 0 else num_theirs))
    if position == 0:  # the result is [*mixed, *free, *theirs]
        thin = jnp.expand_dims(thin, behind_mixed)
        outer = jnp.expand_dims(outer, range(outer.ndim, outer.ndim + num_theirs))
    else:  # the result is [*mixed, *theirs, *free]
        thin = jnp.expand_dims(thin, range(thin.ndim, thin.ndim + len(free)))
        outer = jnp.expand_dims(outer, behind_mixed)
    return thin * outer.astype(thin.dtype)


def _thin_dot(
    equation: Equation, position: int, inner: Array, free: Sequence[int], values: Sequence[Any]
) -> Array:
    """The dot of the factor on the contracted axes, which has no free ones, with the other operand."""
    other = lax.stop_gradient(values[1 - position])
    shape = values[position].shape
    inner = jnp.broadcast_to(inner, [1 if axis in free else n for axis, n in enumerate(shape)])
    inner = lax.squeeze(inner, free)
    rest = [axis for axis in range(len(shape)) if axis not in free]
    numbers = []
    for axes in equation.params["dimension_numbers"]:
        mine = tuple(rest.index(axis) for axis in axes[position])
        theirs = axes[1 - position]
        numbers.append((mine, theirs) if position == 0 else (theirs, mine))
    operands = (inner, other) if position == 0 else (other, inner)
    params = {**equation.params, "dimension_numbers": tuple(numbers)}
    return equation.primitive.bind(*operands, **params)


def _convolution(
    equation: Equation,
    position: int,
    left: Array,
    right: Array,
    values: Sequence[Any],
    out: Shape,
) -> Array | None:
    """The tangent of a convolution whose kernel's tangent is left · right."""
    params = equation.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    kernel = values[1]
    features = numbers.rhs_spec[0]  # the kernel's axis
    contracted = [axis for axis in range(kernel.ndim) if axis != features]
    pair = ordered(left, right, contracted, [features])
    if pair is None:
        return None
    inner, outer = pair
    single = [1 if axis == features else n for axis, n in enumerate(kernel.shape)]
    inner = jnp.broadcast_to(inner, single)
    x = lax.stop_gradient(values[0])
    thin = one_feature(x, inner, outer.size, params)
    thin = equation.primitive.bind(x, inner, **params) if thin is None else thin
    shape = [1] * thin.ndim
    shape[numbers.out_spec[1]] = outer.size
    return thin * outer.reshape(shape).astype(thin.dtype)


def _look_up(
    equation: Equation,
    position: int,
    left: Array,
    right: Array,
    values: Sequence[Any],
    out: Shape,
) -> Array | None:
    """The tangent of a look-up of rows: one factor is looked up, the other is the same for all."""
    numbers = equation.params["dimension_numbers"]
    sizes = equation.params["slice_sizes"]
    if numbers.operand_batching_dims:
        return None
    indexed = numbers.start_index_map
    pair = ordered(left, right, indexed, [])
    if pair is None:
        return None
    rows, rest = pair
    if any(rows.shape[axis] != values[0].shape[axis] for axis in indexed):
        return None
    own = tuple(n if axis in indexed else min(n, rows.shape[axis]) for axis, n in enumerate(sizes))
    # a row that is not there has no tangent
    params = {**equation.params, "slice_sizes": own, "fill_value": 0}
    looked_up = primitives.gather_p.bind(rows, values[1], **params)
    kept = [axis for axis in range(len(sizes)) if axis not in numbers.collapsed_slice_dims]
    shape = [1] * len(out)
    for place, axis in zip(numbers.offset_dims, kept, strict=True):
        shape[place] = rest.shape[axis]
    return jnp.broadcast_to(looked_up * rest.reshape(shape), out)
