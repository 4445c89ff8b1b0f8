"""What an operation that only moves or casts entries makes of a factor of the value that it moves.

A factor has the value's rank, and size 1 along the axes on which it does not depend.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh
from forwax._programs.links import Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """An operation that moves the entries of its first operand.

    Attributes:
        params: the operation's parameters.
        values: the operands.
        shape: of the first operand.
        out: the result's shape.
    """

    params: dict[str, Any]
    values: Sequence[Any]
    shape: Shape
    out: Shape


MoveRule: TypeAlias = Callable[[Move, Array], Array | None]
"""Takes a factor of the first operand to the result's; None where entries would mix."""


def unchanged(move: Move, factor: Array) -> Array:
    """The entries stay as they are."""
    return factor


def vary(move: Move, factor: Array) -> Array:
    """Inside `jax.shard_map`: the entries vary over more mesh axes."""
    return _mesh.vary(factor, move.params["axes"])


def convert_element_type(move: Move, factor: Array) -> Array:
    """A cast."""
    return factor.astype(move.params["new_dtype"])


def transpose(move: Move, factor: Array) -> Array:
    """Axes in another order."""
    return lax.transpose(factor, move.params["permutation"])


def squeeze(move: Move, factor: Array) -> Array:
    """Axes of size 1 go."""
    return lax.squeeze(factor, move.params["dimensions"])


def broadcast_in_dim(move: Move, factor: Array) -> Array:
    """New axes, of size 1 for the factor, which does not depend on them."""
    targets = move.params["broadcast_dimensions"]
    sizes = [1] * len(move.out)
    for axis, size in zip(targets, factor.shape, strict=True):
        sizes[axis] = size
    return factor.reshape(sizes)


def slice_(move: Move, factor: Array) -> Array:
    """A window; along axes of size 1 the factor is the same in every window."""
    params = move.params
    strides = params["strides"] or [1] * factor.ndim
    windows = map(slice, params["start_indices"], params["limit_indices"], strides)
    index = tuple(
        window if n > 1 else slice(None)
        for window, n in zip(windows, factor.shape, strict=True)
    )
    return factor[index]


def dynamic_slice(move: Move, factor: Array) -> Array:
    """A window at an unknown place; see `slice_`."""
    starts = list(move.values[1:])
    sizes = list(move.params["slice_sizes"])
    for axis, length in enumerate(factor.shape):
        if length == 1:  # the same at every place
            starts[axis] = jnp.zeros_like(starts[axis])
            sizes[axis] = 1
    return lax.dynamic_slice(factor, starts, sizes)


def reshape(move: Move, factor: Array) -> Array | None:
    """The same flat order: the factor must depend on all axes that are merged, or on none."""
    if move.params.get("dimensions") is not None:
        return None
    sizes: list[int] = []
    for old, new in _blocks(move.shape, move.out):
        merged = move.shape[old]
        size = math.prod(factor.shape[old])
        if size == math.prod(merged):
            sizes += move.out[new]
        elif size == 1:
            sizes += [1] * len(move.out[new])
        else:
            return None
    return factor.reshape(sizes)


def _blocks(shape: Shape, out: Shape) -> list[tuple[slice, slice]]:
    """The smallest runs of axes of both shapes that hold equally many entries."""
    blocks: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(shape) or j < len(out):
        first_old, first_new = i, j
        left = right = 1
        while True:
            # the side that holds fewer entries takes one more axis, if it has any
            if i < len(shape) and (left <= right or j == len(out)):
                left *= shape[i]
                i += 1
            else:
                right *= out[j]
                j += 1
            if left == right or (i == len(shape) and j == len(out)):
                break
        blocks.append((slice(first_old, i), slice(first_new, j)))
    return blocks
