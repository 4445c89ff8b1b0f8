"""Pytree algebra: the parameters as one flat vector of real coordinates, without ever building that vector.

A complex leaf counts as two real coordinates, stacked on a new leading axis. Everything below this
module works on lists of real arrays only, so that no distribution of tangents has to know what a
complex number is.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree: TypeAlias = Any
Spec: TypeAlias = jax.ShapeDtypeStruct


def is_complex(leaf: Any) -> bool:
    """Whether a leaf counts as two real coordinates per entry."""
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def real_specs(tree: Tree) -> list[Spec]:
    """Shape and dtype of every leaf as real coordinates: a complex leaf gets a leading axis of two."""
    return [_real_spec(leaf) for leaf in jax.tree.leaves(tree)]


def _real_spec(leaf: Any) -> Spec:
    if is_complex(leaf):
        return Spec((2, *leaf.shape), jnp.finfo(leaf.dtype).dtype)
    return Spec(leaf.shape, leaf.dtype)


def num_coordinates(tree: Tree) -> int:
    """The number n of real coordinates of a tree."""
    return count(real_specs(tree))


def count(specs: Sequence[Spec]) -> int:
    """The number n of coordinates of real leaves."""
    return sum(math.prod(spec.shape) for spec in specs)


def to_real(tree: Tree) -> list[Array]:
    """The leaves as real arrays; inverse of `from_real`."""
    return [jnp.stack([x.real, x.imag]) if is_complex(x) else x for x in jax.tree.leaves(tree)]


def from_real(leaves: Sequence[Array], like: Tree, lead: int = 0) -> Tree:
    """Real arrays, in the order of `real_specs(like)` behind `lead` axes, as a tree of the structure of `like`."""
    old, structure = jax.tree.flatten(like)
    return structure.unflatten([_join(x, leaf, lead) for x, leaf in zip(leaves, old, strict=True)])


def _join(real: Array, like: Any, axis: int) -> Array:
    if not is_complex(like):
        return real
    return jax.lax.complex(*(jax.lax.index_in_dim(real, i, axis, keepdims=False) for i in (0, 1)))


def accumulation_dtype(dtype: Any) -> np.dtype:
    """At least float32, so that sums over many tangents or coordinates do not drown in rounding."""
    return np.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def common_dtype(specs: Sequence[Spec]) -> np.dtype:
    """The dtype in which coordinates of all leaves can stand side by side: at least float32."""
    return jnp.result_type(jnp.float32, *(spec.dtype for spec in specs))


def split_flat(flat: Array, specs: Sequence[Spec]) -> list[Array]:
    """Cut an array [..., n] into leaves [..., *shape] with each leaf's dtype."""
    sizes = [math.prod(spec.shape) for spec in specs]
    ends = np.cumsum(sizes)
    lead = flat.shape[:-1]
    parts = [flat[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [
        part.reshape(lead + spec.shape).astype(spec.dtype)
        for part, spec in zip(parts, specs, strict=True)
    ]


def join_flat(leaves: Sequence[Array]) -> Array:
    """Concatenate leaves to one array [n] in the common dtype."""
    dtype = common_dtype([Spec(x.shape, x.dtype) for x in leaves])
    return jnp.concatenate([x.astype(dtype).reshape(-1) for x in leaves])


def basis(index: Array, specs: Sequence[Spec], scale: float = 1.0) -> list[Array]:
    """The vector scale * e_index as leaves; an index outside [0, n) gives zeros."""
    sizes = [math.prod(spec.shape) for spec in specs]
    starts = np.cumsum([0, *sizes[:-1]])
    return [
        jnp.where(jnp.arange(size) + start == index, scale, 0.0)
        .astype(spec.dtype)
        .reshape(spec.shape)
        for spec, size, start in zip(specs, sizes, starts, strict=True)
    ]


def inner(left: Tree, right: Tree) -> Array:
    """The real inner product of two trees over all real coordinates, accumulated in at least float32."""
    products = [_leaf_inner(a, b) for a, b in zip(to_real(left), to_real(right), strict=True)]
    return sum(products[1:], start=products[0])


def _leaf_inner(a: Array, b: Array) -> Array:
    dtype = accumulation_dtype(jnp.promote_types(a.dtype, b.dtype))
    return jnp.sum(a.astype(dtype) * b.astype(dtype))


def conjugate(tree: Tree) -> Tree:
    """The complex conjugate of every leaf: it takes gradients, as `jax.grad` writes them, to directions and back."""
    return jax.tree.map(jnp.conj, tree)


def describe(leaf: Any) -> str:
    """A short name for a leaf in an error message: dtype and shape, or its Python type."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return type(leaf).__name__
