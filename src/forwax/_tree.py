"""Pytree algebra: the parameters as one flat vector of real coordinates, which is never built.

A complex leaf counts as two real coordinates, stacked on a new leading axis. Everything below this
module works on lists of real arrays only, so that no distribution of tangents has to know what a
complex number is.
"""

# pyright: strict, reportUnknownMemberType=false

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import Precision

Tree: TypeAlias = Any
Spec: TypeAlias = jax.ShapeDtypeStruct


def is_complex(leaf: Any) -> bool:
    """Whether a leaf counts as two real coordinates per entry."""
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def real_specs(tree: Tree) -> list[Spec]:
    """Shape and dtype of every leaf as real coordinates: a complex leaf gets an axis of two."""
    return [_real_spec(leaf) for leaf in jax.tree.leaves(tree)]


def _real_spec(leaf: Any) -> Spec:
    if not is_complex(leaf):
        return Spec(leaf.shape, leaf.dtype)
    part_dtype = cast(Any, jnp.finfo(leaf.dtype).dtype)
    return Spec((2, *leaf.shape), part_dtype)


def num_coordinates(tree: Tree) -> int:
    """The number n of real coordinates of a tree."""
    return count(real_specs(tree))


def count(specs: Sequence[Spec]) -> int:
    """The number n of coordinates of real leaves."""
    return sum(_sizes(specs))


def _sizes(specs: Sequence[Spec]) -> list[int]:
    return [math.prod(spec.shape) for spec in specs]


def as_array(leaf: Any) -> Array:
    """A leaf, a Python number for instance, as a JAX array."""
    return jnp.asarray(leaf)


def with_leaves(tree: Tree, leaves: Sequence[Any]) -> Tree:
    """A tree of the same structure with other leaves."""
    # JAX declares no type for structures.
    structure = cast(Any, jax.tree.structure(tree))
    return structure.unflatten(leaves)


def to_real(tree: Tree) -> list[Array]:
    """The leaves as real arrays; inverse of `from_real`."""
    return [_split_complex(leaf) for leaf in jax.tree.leaves(tree)]


def _split_complex(leaf: Array) -> Array:
    if not is_complex(leaf):
        return leaf
    # [*shape] -> [2, *shape]
    return jnp.stack([leaf.real, leaf.imag])


def from_real(leaves: Sequence[Array], like: Tree, lead: int = 0) -> Tree:
    """Real arrays, in the order of `real_specs(like)` behind `lead` axes, as a tree like `like`."""
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    joined = [_join_complex(real, leaf, lead) for real, leaf in pairs]
    return with_leaves(like, joined)


def _join_complex(parts: Array, like: Any, axis: int) -> Array:
    if not is_complex(like):
        return parts
    # [*lead, 2, *shape] -> [*lead, *shape]
    real = jax.lax.index_in_dim(parts, 0, axis, keepdims=False)
    imaginary = jax.lax.index_in_dim(parts, 1, axis, keepdims=False)
    return jax.lax.complex(real, imaginary)


def promoted(*dtypes: Any) -> np.dtype:
    """The dtype that JAX gives to a product, also where a user's settings forbid to mix them."""
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(jnp.result_type(*dtypes))


def accumulation_dtype(dtype: Any) -> np.dtype:
    """At least float32: sums over many tangents or coordinates do not drown in rounding."""
    # Floats of 16 and of 8 bits.
    if jnp.finfo(dtype).bits < 32:
        return np.dtype(jnp.float32)
    return np.dtype(dtype)


def common_dtype(specs: Sequence[Spec]) -> np.dtype:
    """The dtype in which coordinates of all leaves can stand side by side: at least float32."""
    dtypes = [spec.dtype for spec in specs]
    return promoted(jnp.float32, *dtypes)


def split_flat(flat: Array, specs: Sequence[Spec]) -> list[Array]:
    """Cut an array [..., n] into leaves [..., *shape] with each leaf's dtype."""
    parts: list[Array] = []
    start = 0
    for size in _sizes(specs):
        stop = start + size
        parts.append(flat[..., start:stop])
        start = stop
    lead = flat.shape[:-1]
    return [
        part.reshape(lead + spec.shape).astype(spec.dtype)
        for part, spec in zip(parts, specs, strict=True)
    ]


def join_flat(leaves: Sequence[Array]) -> Array:
    """Concatenate leaves to one array [n] in the common dtype."""
    specs = [Spec(leaf.shape, leaf.dtype) for leaf in leaves]
    dtype = common_dtype(specs)
    flat = [leaf.astype(dtype).reshape(-1) for leaf in leaves]
    return jnp.concatenate(flat)


def basis(
    index: Array,
    specs: Sequence[Spec],
    scale: float = 1.0,
) -> list[Array]:
    """The vector scale * e_index as leaves; an index outside [0, n) gives zeros."""
    leaves: list[Array] = []
    start = 0
    for spec, size in zip(specs, _sizes(specs), strict=True):
        # Positions count on over the leaves, so that exactly one leaf holds the index.
        is_index = jnp.arange(size) + start == index
        flat = jnp.where(is_index, scale, 0.0)
        leaves.append(flat.astype(spec.dtype).reshape(spec.shape))
        start += size
    return leaves


def inner(left: Tree, right: Tree) -> Array:
    """The real inner product of two trees over all coordinates, summed in at least float32."""
    pairs = zip(to_real(left), to_real(right), strict=True)
    return added([_leaf_inner(a, b) for a, b in pairs])


def _leaf_inner(a: Array, b: Array) -> Array:
    dtype = accumulation_dtype(promoted(a.dtype, b.dtype))
    return jnp.sum(a.astype(dtype) * b.astype(dtype))


def gram(left: Tree, right: Tree) -> Array:
    """Real inner products [k, l] of trees with a leading axis k, and l, in at least float32."""
    dtype = common_dtype(real_specs(left))

    def rows(x: Array) -> Array:
        flat = x.reshape(x.shape[0], -1)
        if is_complex(x):
            # [k, size] -> [k, 2 size]
            flat = jnp.concatenate([flat.real, flat.imag], axis=1)
        return flat.astype(dtype)

    def of_leaf(x: Array, y: Array) -> Array:
        # Accelerators round a product's operands by default, which is too coarse to be inverted.
        return jnp.matmul(rows(x), rows(y).T, precision=Precision.HIGHEST)

    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return added([of_leaf(x, y) for x, y in pairs])


def added(terms: Sequence[Array]) -> Array:
    """The sum of at least one term, from left to right."""
    return functools.reduce(operator.add, terms)


def all_finite(tree: Tree) -> Array:
    """Whether all entries of all inexact leaves are finite."""
    leaves = jax.tree.leaves(tree)
    inexact = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.all(jnp.isfinite(x)) for x in inexact]).all()


def conjugate(tree: Tree) -> Tree:
    """The complex conjugate of every leaf.

    It takes gradients, as `jax.grad` writes them, to directions and back.
    """
    return jax.tree.map(jnp.conj, tree)


def check_guess(
    name: str,
    got: list[tuple[int, ...]],
    expected: list[tuple[int, ...]],
) -> None:
    """Raise a ValueError for a guess whose leaves have other shapes than the parameters."""
    if got != expected:
        raise ValueError(
            f"{name}: the guess must have the parameters' structure; expected leaf shapes "
            f"{expected}, got {got}."
        )


def describe(leaf: Any) -> str:
    """A short name for a leaf in an error message: dtype and shape, or its Python type."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return type(leaf).__name__
    shape = ",".join(map(str, leaf.shape))
    return f"{leaf.dtype}[{shape}]"


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf is a tracer that has no value yet."""
    if not isinstance(leaf, jax.Array):
        return False
    try:
        leaf.addressable_data(0)
    except jax.errors.ConcretizationTypeError:
        return True
    return False
