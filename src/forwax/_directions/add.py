"""Sums of scaled outer products of thin factors: as a gradient, or added to a parameter without holding the sum."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision

from forwax import _mesh, _tree
from forwax._directions.factored import Pair
from forwax._directions.signs import Signs

FEW = 8
"""So many terms are added entry by entry, in one pass over the parameter; more are a dot."""


_NUM_BLOCKS = 16


_SMALL = 1 << 12


def outer(coefficients: Array, pairs: Sequence[Pair], leaf: Array) -> Array:
    """Σ c left · right over the leading axes and pairs, in at least float32.

    Args:
        coefficients: one for each term, of any rank.
        pairs: factors of the leaf's rank behind the axes of the coefficients, of size 1 where they
            do not depend.
        leaf: the parameter.
    """
    parts = [_outer(coefficients, left, right, leaf) for left, right in pairs]
    return sum(parts[1:], start=parts[0])


def whole(tangent: Array) -> list[Pair]:
    """A tangent that is not in factors, as if it were."""
    return [(jnp.conj(tangent), jnp.ones([1] * tangent.ndim, tangent.real.dtype))]


def _outer(coefficients: Array, left: Array, right: Array, leaf: Array) -> Array:
    """Σ c left · right over the leading axes, as one dot where there are many terms."""
    lead, wide = coefficients.ndim, _tree.accumulation_dtype(leaf.dtype)
    scaled = _scaled(coefficients, left, leaf)
    if math.prod(coefficients.shape) == 1:
        return (scaled * right.astype(wide)).reshape(
            jnp.broadcast_shapes(left.shape, right.shape)[lead:]
        )
    if (
        math.prod(right.shape) == 1
    ):  # an einsum would multiply by it, and then add up with a slow loop
        total = jnp.tensordot(
            coefficients.astype(scaled.dtype),
            left.astype(wide),
            lead,
            precision=Precision.HIGHEST,
        )
        return total * right.reshape(()).astype(wide)
    names = "abcdefghijklmnopqrstuvwxyz"
    out, first = names[: leaf.ndim], names[leaf.ndim : leaf.ndim + lead]

    def named(x: Array) -> tuple[Array, str]:
        kept = [axis for axis in range(leaf.ndim) if x.shape[lead + axis] > 1]
        return x.reshape(
            *x.shape[:lead], *(x.shape[lead + axis] for axis in kept)
        ), first + "".join(out[axis] for axis in kept)

    (a, left_names), (b, right_names) = named(scaled), named(right.astype(wide))
    kept = "".join(name for name in out if name in left_names + right_names)
    return jnp.einsum(f"{left_names},{right_names}->{kept}", a, b).reshape(leaf.shape)


def _scaled(coefficients: Array, left: Array, leaf: Array) -> Array:
    wide = _tree.accumulation_dtype(leaf.dtype)
    scale = coefficients.reshape(*coefficients.shape, *[1] * leaf.ndim).astype(wide)
    return scale * left.astype(wide)


def add_outer(leaf: Array, coefficients: Array, pairs: Sequence[Pair]) -> Array:
    """The leaf + Σ c left · right, see `outer`, of which no more than a block is held beside the leaf.

    Few terms are one elementwise pass, which compilers do in place; many are a dot for each block
    of rows.
    """
    if math.prod(coefficients.shape) * len(pairs) <= FEW:
        return _add_terms(leaf, coefficients, pairs)

    def add(part: Array, cut: Callable[[Array], Array]) -> Array:
        total = outer(coefficients, [(cut(left), cut(right)) for left, right in pairs], part)
        return (part.astype(total.dtype) + total).astype(part.dtype)

    return (
        add(leaf, lambda x: x) if leaf.size < _SMALL else _by_blocks(leaf, coefficients.ndim, add)
    )


def _add_terms(leaf: Array, coefficients: Array, pairs: Sequence[Pair]) -> Array:
    lead, wide = coefficients.ndim, _tree.accumulation_dtype(leaf.dtype)
    total = leaf.astype(wide)
    for left, right in pairs:
        scaled, right = (
            x.reshape(math.prod(x.shape[:lead]), *x.shape[lead:])
            for x in (_scaled(coefficients, left, leaf), right)
        )
        for j in range(scaled.shape[0]):
            total = total + scaled[j] * (right[j] if right.shape[0] > 1 else right[0]).astype(wide)
    return total.astype(leaf.dtype)


def _by_blocks(
    leaf: Array, lead: int, add: Callable[[Array, Callable[[Array], Array]], Array]
) -> Array:
    """Apply `add` to one block of the first axis with several entries after the other, in place."""
    axis = next(i for i, n in enumerate(leaf.shape) if n > 1)
    size = -(-leaf.shape[axis] // _NUM_BLOCKS)

    def at(leaf: Array, start: Array | int, size: int) -> Array:
        def cut(x: Array) -> Array:
            own = lead + axis
            return x if x.shape[own] == 1 else lax.dynamic_slice_in_dim(x, start, size, own)

        part = add(lax.dynamic_slice_in_dim(leaf, start, size, axis), cut)
        return lax.dynamic_update_slice_in_dim(leaf, part, start, axis)

    full, rest = divmod(leaf.shape[axis], size)
    leaf = lax.fori_loop(0, full, lambda i, leaf: at(leaf, i * size, size), leaf)
    return at(leaf, full * size, rest) if rest else leaf


def add_signs(total: Array, coefficients: Array, signs: Signs) -> Array:
    """Total + Σ c v over tangents [k] of dense signs, one after the other: none is held.

    Added up in one pass they are unpacked entry by entry, which takes ten times as long.
    """

    def add(j: Array | int, total: Array) -> Array:
        return total + coefficients[j].astype(total.dtype) * signs.tangent(j).unpack().astype(
            total.dtype
        )

    if len(coefficients) == 1:
        return add(0, total)
    return lax.fori_loop(0, len(coefficients), add, _mesh.vary(total, _mesh.axes(add(0, total))))
