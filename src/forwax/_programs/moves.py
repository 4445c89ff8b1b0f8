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
    sizes = dict(zip(move.params["broadcast_dimensions"], factor.shape, strict=True))
    return factor.reshape([sizes.get(axis, 1) for axis in range(len(move.out))])


def slice_(move: Move, factor: Array) -> Array:
    """A window; along axes of size 1 the factor is the same in every window."""
    params = move.params
    strides = params["strides"] or [1] * factor.ndim
    windows = map(slice, params["start_indices"], params["limit_indices"], strides)
    pairs = zip(windows, factor.shape, strict=True)
    return factor[tuple(window if n > 1 else slice(None) for window, n in pairs)]


def dynamic_slice(move: Move, factor: Array) -> Array:
    """A window at an unknown place; see `slice_`."""
    depends = [n > 1 for n in factor.shape]
    starts = [
        start if own else jnp.zeros_like(start)
        for start, own in zip(move.values[1:], depends, strict=True)
    ]
    sizes = [n if own else 1 for n, own in zip(move.params["slice_sizes"], depends, strict=True)]
    return lax.dynamic_slice(factor, starts, sizes)


def reshape(move: Move, factor: Array) -> Array | None:
    """The same flat order, if the factor depends on all or none of the axes merged or cut together."""
    if move.params.get("dimensions") is not None:
        return None
    sizes: list[int] = []
    for old, new in _blocks(move.shape, move.out):
        own = [n for n in factor.shape[old] if n > 1]
        if not own:
            sizes += [1] * len(move.out[new])
        elif math.prod(own) == math.prod(move.shape[old]):
            sizes += move.out[new]
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
