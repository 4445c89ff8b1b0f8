"""Σ c v of one parameter, where v is an array or in thin factors: by itself, or added in place.

Weights have any rank, [*lead]; tangents have these axes in front: [*lead, *shape].
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision

from forwax import _tree

Pair: TypeAlias = tuple[Array, Array]
"""Two factors of a tangent's rank, of size 1 along axes on which they do not depend."""


FEW = 8
"""So many terms are added entry by entry, in one pass over the parameter; more are a dot."""


_NUM_BLOCKS = 16


_SMALL = 1 << 12


def weighted_sum(weights: Array, tangents: Array) -> Array:
    """Σ c v over the leading axes, accumulated in at least float32."""
    wide = tangents.astype(_tree.accumulation_dtype(tangents.dtype))
    if math.prod(weights.shape) == 1:
        return weights.reshape(()).astype(wide.dtype) * wide.reshape(wide.shape[weights.ndim :])
    weights = weights.astype(wide.dtype)
    return jnp.tensordot(weights, wide, axes=weights.ndim, precision=Precision.HIGHEST)


def outer(weights: Array, pairs: Sequence[Pair], leaf: Array) -> Array:
    """Σ c left · right over the leading axes and pairs, in at least float32.

    Args:
        weights: one for each term.
        pairs: the factors.
        leaf: the parameter.
    """
    parts = [_outer(weights, left, right, leaf) for left, right in pairs]
    return sum(parts[1:], start=parts[0])


def as_pair(tangents: Array) -> Pair:
    """Tangents that are not in factors, as if they were.

    The conjugate makes complex estimates agree with the convention of `jax.grad`.
    """
    return jnp.conj(tangents), jnp.ones([1] * tangents.ndim, tangents.real.dtype)


def _outer(weights: Array, left: Array, right: Array, leaf: Array) -> Array:
    lead = weights.ndim
    wide = _tree.accumulation_dtype(leaf.dtype)
    if math.prod(right.shape) == 1:
        # An einsum would multiply by it, and then add up with a slow loop.
        return weighted_sum(weights, left) * right.reshape(()).astype(wide)
    scaled = _scaled(weights, left, leaf)
    if math.prod(weights.shape) == 1:
        shape = jnp.broadcast_shapes(left.shape, right.shape)[lead:]
        return (scaled * right.astype(wide)).reshape(shape)
    names = "abcdefghijklmnopqrstuvwxyz"
    own = names[: leaf.ndim]
    terms = names[leaf.ndim : leaf.ndim + lead]

    def named(x: Array) -> tuple[Array, str]:
        """The factor without the axes on which it does not depend, and the names of the others."""
        axes = [axis for axis in range(leaf.ndim) if x.shape[lead + axis] > 1]
        sizes = [x.shape[lead + axis] for axis in axes]
        return x.reshape(*x.shape[:lead], *sizes), "".join(own[axis] for axis in axes)

    left, left_names = named(scaled)
    right, right_names = named(right.astype(wide))
    result = "".join(name for name in own if name in left_names + right_names)
    total = jnp.einsum(f"{terms}{left_names},{terms}{right_names}->{result}", left, right)
    return total.reshape(leaf.shape)


def _scaled(weights: Array, left: Array, leaf: Array) -> Array:
    wide = _tree.accumulation_dtype(leaf.dtype)
    scale = weights.reshape(*weights.shape, *[1] * leaf.ndim)
    return scale.astype(wide) * left.astype(wide)


def add_outer(leaf: Array, weights: Array, pairs: Sequence[Pair]) -> Array:
    """The leaf + Σ c left · right, see `outer`; of the sum no more than a block is held.

    Few terms are one elementwise pass, which compilers do in place; many are a dot for each block
    of rows.
    """
    if math.prod(weights.shape) * len(pairs) <= FEW:
        return _add_terms(leaf, weights, pairs)

    def add(part: Array, cut: Callable[[Array], Array]) -> Array:
        total = outer(weights, [(cut(left), cut(right)) for left, right in pairs], part)
        return (part.astype(total.dtype) + total).astype(part.dtype)

    if leaf.size < _SMALL:
        return add(leaf, lambda x: x)
    return _by_blocks(leaf, weights.ndim, add)


def _add_terms(leaf: Array, weights: Array, pairs: Sequence[Pair]) -> Array:
    lead = weights.ndim
    wide = _tree.accumulation_dtype(leaf.dtype)

    def flat(x: Array) -> Array:
        """The factor with one leading axis: [terms, *shape]."""
        return x.reshape(math.prod(x.shape[:lead]), *x.shape[lead:])

    total = leaf.astype(wide)
    for left, right in pairs:
        lefts = flat(_scaled(weights, left, leaf))
        rights = flat(right)
        for j in range(lefts.shape[0]):
            one = rights[j] if rights.shape[0] > 1 else rights[0]
            total = total + lefts[j] * one.astype(wide)
    return total.astype(leaf.dtype)


def _by_blocks(
    leaf: Array, lead: int, add: Callable[[Array, Callable[[Array], Array]], Array]
) -> Array:
    """Apply `add` to one block of the first long axis after the other, in place."""
    axis = next(i for i, n in enumerate(leaf.shape) if n > 1)
    size = -(-leaf.shape[axis] // _NUM_BLOCKS)

    def at(leaf: Array, start: Array | int, size: int) -> Array:
        def cut(x: Array) -> Array:
            """The part of a factor that belongs to the block."""
            own = lead + axis
            return x if x.shape[own] == 1 else lax.dynamic_slice_in_dim(x, start, size, own)

        part = add(lax.dynamic_slice_in_dim(leaf, start, size, axis), cut)
        return lax.dynamic_update_slice_in_dim(leaf, part, start, axis)

    full, rest = divmod(leaf.shape[axis], size)
    leaf = lax.fori_loop(0, full, lambda i, leaf: at(leaf, i * size, size), leaf)
    return at(leaf, full * size, rest) if rest else leaf
