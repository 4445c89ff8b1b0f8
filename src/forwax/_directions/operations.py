"""What moves, dots, convolutions and look-ups make of a tangent in factors, without forming it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from forwax._directions.add import Pair
from forwax._directions.convolution import one_feature
from forwax._directions.direction import Shape
from forwax._directions.factored import Factored
from forwax._programs.evaluate import bind
from forwax._programs.moves import Move
from forwax._programs.program import Equation


def is_move(equation: Equation) -> bool:
    """Whether an operation only moves or casts the entries of its first operand.

    Then the tangents move with them.
    """
    facts = equation.facts
    if facts.casts:
        return bool(jnp.issubdtype(equation.params["new_dtype"], jnp.inexact))
    return facts.move_of_factors is not None


def added(equation: Equation, position: int, tangent: Factored) -> Factored:
    """The tangent of a sum, or a difference, with something that has none."""
    pairs: list[Pair] = []
    for left, right in tangent.pairs:
        terms = [jnp.zeros_like(left)] * 2
        terms[position] = left
        pairs.append((bind(equation, terms)[0], right))
    return Factored.of(pairs)


def moved(
    equation: Equation,
    tangent: Factored,
    values: Sequence[Any],
    shape: Shape,
    out: Shape,
) -> Factored | None:
    """The tangent behind a move from one shape to another; None where the factors would mix."""
    rule = equation.facts.move_of_factors
    if rule is None:
        return None
    move = Move(equation.params, values, shape, out)
    pairs: list[Pair] = []
    for left, right in tangent.pairs:
        new_left = rule(move, left)
        new_right = rule(move, right)
        if new_left is None or new_right is None:
            return None
        pairs.append((new_left, new_right))
    return Factored.of(pairs)


def ordered(
    left: Array,
    right: Array,
    contracted: Sequence[int],
    free: Sequence[int],
) -> Pair | None:
    """The factor on the contracted axes, and the other, which must be one on them."""

    def depends(x: Array, axes: Sequence[int]) -> bool:
        return any(x.shape[axis] > 1 for axis in axes)

    for inner, outer in ((left, right), (right, left)):
        if not depends(outer, contracted) and not depends(inner, free):
            return inner, outer
    return None


def product(
    equation: Equation,
    position: int,
    tangent: Factored,
    values: Sequence[Any],
    out: Shape,
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
    facts = equation.facts
    if facts.is_dot:
        through = _dot_product
    elif facts.is_convolution and position == 1:
        through = _convolution
    elif facts.looks_up and position == 0:
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


def of_both(
    equation: Equation, tangents: Sequence[Factored], values: Sequence[Any]
) -> Factored | None:
    """The tangent of a dot of two values with tangents in factors, as of weights a @ b.

    Returns:
        None where the tangents must be formed.
    """
    pairs: list[Pair] = []
    for position, tangent in enumerate(tangents):
        for left, right in tangent.pairs:
            pair = _factors_of_dot(equation, position, left, right, values)
            if pair is None:
                return None
            pairs.append(pair)
    return Factored.of(pairs)


def _dot_product(
    equation: Equation,
    position: int,
    left: Array,
    right: Array,
    values: Sequence[Any],
    out: Shape,
) -> Array | None:
    factors = _factors_of_dot(equation, position, left, right, values)
    return None if factors is None else factors[0] * factors[1]


def _factors_of_dot(
    equation: Equation,
    position: int,
    left: Array,
    right: Array,
    values: Sequence[Any],
) -> Pair | None:
    """The factors of a dot's tangent, one thin dot and the factor that it leaves as it is."""
    contracted, batch = equation.params["dimension_numbers"]
    own = contracted[position]
    mixed = batch[position]
    rank = len(values[position].shape)
    bound = {*own, *mixed}
    free = [axis for axis in range(rank) if axis not in bound]
    pair = ordered(left, right, own, free)
    if pair is None:
        return None
    inner, outer = pair
    thin = _thin_dot(equation, position, inner, free, values)  # [*mixed, *theirs]
    order = (*mixed, *free, *own)
    outer = lax.transpose(outer, order)
    outer = lax.squeeze(outer, range(rank - len(own), rank))  # [*mixed, *free]
    num_mixed = len(mixed)
    num_free = len(free)
    num_theirs = thin.ndim - num_mixed
    if position == 0:  # the result is [*mixed, *free, *theirs]
        thin_at = num_mixed
        outer_at = num_mixed + num_free
    else:  # the result is [*mixed, *theirs, *free]
        thin_at = num_mixed + num_theirs
        outer_at = num_mixed
    thin = jnp.expand_dims(thin, range(thin_at, thin_at + num_free))
    outer = jnp.expand_dims(outer, range(outer_at, outer_at + num_theirs))
    return thin, outer.astype(thin.dtype)


def _thin_dot(
    equation: Equation,
    position: int,
    inner: Array,
    free: Sequence[int],
    values: Sequence[Any],
) -> Array:
    """The dot of the factor on the contracted axes with the other operand."""
    shape = values[position].shape
    single = [1 if axis in free else n for axis, n in enumerate(shape)]
    inner = jnp.broadcast_to(inner, single)
    inner = lax.squeeze(inner, free)
    rest = [axis for axis in range(len(shape)) if axis not in free]
    numbers: list[tuple[Any, ...]] = []
    for axes in equation.params["dimension_numbers"]:
        both = list(axes)
        both[position] = tuple(rest.index(axis) for axis in axes[position])
        numbers.append(tuple(both))
    operands = list(values)
    operands[position] = inner
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
    x = values[0]
    thin = one_feature(x, inner, outer.size, params)
    thin = equation.primitive.bind(x, inner, **params) if thin is None else thin
    shape = [1] * thin.ndim
    shape[numbers.out_spec[1]] = outer.size  # the result's features
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
    if numbers.operand_batching_dims:  # each batch index looks up rows of its own
        return None
    indexed = numbers.start_index_map
    pair = ordered(left, right, indexed, [])
    if pair is None:
        return None
    rows, rest = pair
    if any(rows.shape[axis] != values[0].shape[axis] for axis in indexed):
        return None
    own: list[int] = []
    for axis, n in enumerate(sizes):
        own.append(n if axis in indexed else min(n, rows.shape[axis]))
    # a row that is not there has no tangent
    changed = {"slice_sizes": tuple(own), "fill_value": 0}
    params = {**equation.params, **changed}
    looked_up = equation.primitive.bind(rows, values[1], **params)
    kept = [
        axis for axis in range(len(sizes)) if axis not in numbers.collapsed_slice_dims
    ]
    shape = [1] * len(out)
    for place, axis in zip(numbers.offset_dims, kept, strict=True):
        shape[place] = rest.shape[axis]
    return jnp.broadcast_to(looked_up * rest.reshape(shape), out)
