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
from forwax._directions.rounding import NEAREST, Rounding

Pair: TypeAlias = tuple[Array, Array]
"""Two factors of a tangent's rank, of size 1 along axes on which they do not depend."""


Cut: TypeAlias = Callable[[Array], Array]
"""Takes a factor of the parameter to that of one block of it."""


FEW = 8
"""So many terms are added entry by entry, in one pass over the parameter; more are a dot."""


_NUM_BLOCKS = 16


_SMALL = 1 << 12


def weighted_sum(weights: Array, tangents: Array) -> Array:
    """Σ c v over the leading axes, accumulated in at least float32."""
    lead = weights.ndim
    dtype = _tree.accumulation_dtype(tangents.dtype)
    wide = tangents.astype(dtype)
    if weights.size == 1:
        weight = weights.reshape(()).astype(dtype)
        return weight * wide.reshape(wide.shape[lead:])
    return jnp.tensordot(
        weights.astype(dtype),
        wide,
        axes=lead,
        precision=Precision.HIGHEST,
    )


def sum_where_moved(weights: Array, tangents: Array) -> Array:
    """As `weighted_sum`, of conjugates, where a weight that is not finite stays with its entries.

    An entry of 0 has no part in the sum, whatever its weight.
    """
    dtype = _tree.accumulation_dtype(tangents.dtype)
    wide = jnp.conj(tangents).astype(dtype)  # [*lead, *shape]
    ones = [1] * (tangents.ndim - weights.ndim)
    scale = weights.reshape(*weights.shape, *ones).astype(dtype)
    terms = jnp.where(wide == 0, 0, scale * wide)
    return jnp.sum(terms, axis=range(weights.ndim))


def outer(
    weights: Array,
    pairs: Sequence[Pair],
    leaf: Array,
) -> Array:
    """Σ c left · right over the leading axes and pairs, in at least float32.

    Args:
        weights: one for each term.
        pairs: the factors.
        leaf: the parameter.
    """
    total = None
    for left, right in pairs:
        term = _outer(weights, left, right, leaf)
        total = term if total is None else total + term
    assert total is not None
    return total


def as_pair(tangents: Array) -> Pair:
    """Tangents that are not in factors, as if they were.

    The conjugate makes complex estimates agree with the convention of `jax.grad`.
    """
    ones = jnp.ones([1] * tangents.ndim, tangents.real.dtype)
    return jnp.conj(tangents), ones


def _outer(
    weights: Array,
    left: Array,
    right: Array,
    leaf: Array,
) -> Array:
    lead = weights.ndim
    dtype = _tree.accumulation_dtype(leaf.dtype)
    if right.size == 1:
        # An einsum would multiply by it, and then add up with a slow loop.
        return weighted_sum(weights, left) * right.reshape(()).astype(dtype)
    left = _scaled(weights, left, leaf)  # [*lead, ...], as right
    right = right.astype(dtype)
    if weights.size == 1:
        product = left * right
        return product.reshape(product.shape[lead:])
    letters = "abcdefghijklmnopqrstuvwxyz"
    own = letters[: leaf.ndim]
    terms = letters[leaf.ndim : leaf.ndim + lead]

    def names_of(factor: Array) -> str:
        """The axes on which a factor depends, by name."""
        sizes = factor.shape[lead:]
        return "".join(name for name, n in zip(own, sizes, strict=True) if n > 1)

    def without_ones(factor: Array) -> Array:
        sizes = [n for n in factor.shape[lead:] if n > 1]
        return factor.reshape(*factor.shape[:lead], *sizes)

    left_names = names_of(left)
    right_names = names_of(right)
    result = "".join(name for name in own if name in left_names + right_names)
    total = jnp.einsum(
        f"{terms}{left_names},{terms}{right_names}->{result}",
        without_ones(left),
        without_ones(right),
    )
    return total.reshape(leaf.shape)


def _scaled(
    weights: Array,
    left: Array,
    leaf: Array,
) -> Array:
    """The left factors, each times its weight: [*lead, ...]."""
    dtype = _tree.accumulation_dtype(leaf.dtype)
    ones = [1] * leaf.ndim
    scale = weights.reshape(*weights.shape, *ones)
    return scale.astype(dtype) * left.astype(dtype)


def add_outer(
    leaf: Array,
    weights: Array,
    pairs: Sequence[Pair],
    rounding: Rounding = NEAREST,
) -> Array:
    """The leaf + Σ c left · right, see `outer`; of the sum no more than a block is held.

    Few terms are one elementwise pass, which compilers do in place; many are a dot for each block
    of rows.
    """
    num_terms = weights.size * len(pairs)
    if num_terms <= FEW:
        return _add_terms(leaf, weights, pairs, rounding)

    def add(block: Array, cut: Cut, offset: Array | int) -> Array:
        parts = [(cut(left), cut(right)) for left, right in pairs]
        total = outer(weights, parts, block)
        new = block.astype(total.dtype) + total
        return rounding.cast(new, block.dtype, offset)

    if leaf.size < _SMALL:  # a loop would cost more than it saves
        return add(leaf, lambda factor: factor, 0)
    return _by_blocks(leaf, weights.ndim, add)


def _add_terms(
    leaf: Array,
    weights: Array,
    pairs: Sequence[Pair],
    rounding: Rounding,
) -> Array:
    lead = weights.ndim
    dtype = _tree.accumulation_dtype(leaf.dtype)

    def flat(x: Array) -> Array:
        """The factor with one leading axis: [terms, *shape]."""
        num_terms = math.prod(x.shape[:lead])
        return x.reshape(num_terms, *x.shape[lead:])

    total = leaf.astype(dtype)
    for left, right in pairs:
        lefts = flat(_scaled(weights, left, leaf))
        rights = flat(right)
        is_shared = rights.shape[0] == 1  # as the ones of `as_pair`
        for j in range(lefts.shape[0]):
            own = rights[0] if is_shared else rights[j]
            total = total + lefts[j] * own.astype(dtype)
    return rounding.cast(total, leaf.dtype)


def _by_blocks(
    leaf: Array,
    lead: int,
    add: Callable[[Array, Cut, Array | int], Array],
) -> Array:
    """Apply `add` to one block of the first long axis after the other, in place."""
    axis = next(i for i, n in enumerate(leaf.shape) if n > 1)
    length = leaf.shape[axis]
    size = -(-length // _NUM_BLOCKS)
    stride = leaf.size // length  # all axes before are of size 1

    def at(
        leaf: Array,
        start: Array | int,
        size: int,
    ) -> Array:
        def cut(factor: Array) -> Array:
            own = lead + axis
            if factor.shape[own] == 1:
                return factor
            return lax.dynamic_slice_in_dim(factor, start, size, own)

        block = lax.dynamic_slice_in_dim(leaf, start, size, axis)
        new = add(block, cut, start * stride)
        return lax.dynamic_update_slice_in_dim(leaf, new, start, axis)

    def step(i: Array, leaf: Array) -> Array:
        return at(leaf, i * size, size)

    num_full = length // size
    rest = length % size
    leaf = lax.fori_loop(0, num_full, step, leaf)
    return at(leaf, num_full * size, rest) if rest else leaf
