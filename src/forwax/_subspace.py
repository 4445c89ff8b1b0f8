"""Linear algebra in the span of k directions, which are drawn where they are needed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision

from forwax import _tree
from forwax._directions.formed import Formed
from forwax._pushforward import num_chunks
from forwax._tree import Tree

Draw = Callable[[Array], Tree]
"""Takes indices [c] to directions, a tree like the parameters with a leading axis c."""


def product(left: Array, right: Array) -> Array:
    """A product of matrices or vectors at full precision."""
    # Accelerators round a product's operands by default.
    return jnp.matmul(left, right, precision=Precision.HIGHEST)


def gram(draw: Draw, num_tangents: int, chunk_size: int | None) -> Array:
    """G = V Vᵀ [k, k], of which two chunks of V are held at a time."""
    chunks = _chunks(num_tangents, chunk_size)
    if len(chunks) == 1:
        drawn = draw(chunks[0])
        return _tree.gram(drawn, drawn)

    def row(indices: Array) -> Array:
        left = draw(indices)

        def block(others: Array) -> Array:
            right = draw(others)
            return _tree.gram(left, right)

        return lax.map(block, chunks)

    # [chunks, chunks, c, c] -> [k, k]
    blocks = jnp.swapaxes(lax.map(row, chunks), 1, 2)
    size = chunks.size
    return blocks.reshape(size, size)[:num_tangents, :num_tangents]


def _chunks(num_tangents: int, chunk_size: int | None) -> Array:
    """The indices of all directions [chunks, c], the last one repeated to fill."""
    chunks = num_chunks(num_tangents, chunk_size)
    size = -(-num_tangents // chunks)
    indices = jnp.arange(chunks * size)
    filled = jnp.minimum(indices, num_tangents - 1)
    return filled.reshape(chunks, size)


def solved(
    curvature: Array, metric: Array | None, slope: Array, damping: float | Array
) -> Array:
    """The weights a [k] of the directions, (A + damping · tr(A)/tr(G) · G) a = b.

    Without damping it is its limit, the solution of least norm: what A and G leave open, up to
    rounding, as directions that repeat one another, gets no weight.
    """
    dtype = _tree.promoted(curvature.dtype, slope.dtype)
    basis = jnp.eye(len(slope), dtype=dtype)
    size = len(slope)
    if metric is not None:
        dtype = _tree.promoted(dtype, metric.dtype)
        squares, axes = jnp.linalg.eigh(metric.astype(dtype))
        inverse = _inverse(squares, squares[-1])
        basis = axes * jnp.sqrt(inverse)[None, :]  # Bᵀ G B = 1
        size = jnp.trace(metric).astype(dtype)
    curvature = curvature.astype(dtype)
    mean = jnp.trace(curvature) / size
    left = product(basis.T, curvature)
    whitened = product(left, basis)
    curvatures, axes = jnp.linalg.eigh(whitened)
    # What is negative is rounding, for a loss that is convex.
    least = jnp.asarray(damping).astype(dtype) * mean
    damped = jnp.maximum(curvatures, 0) + least
    inverse = _inverse(damped, curvatures[-1])
    basis = product(basis, axes)
    known = product(basis.T, slope.astype(dtype))
    return product(basis, inverse * known)


def _inverse(eigenvalues: Array, largest: Array) -> Array:
    """1/x of each of k eigenvalues; 0 for what is below the rounding of their matrix."""
    rounding = len(eigenvalues) * jnp.finfo(eigenvalues.dtype).eps * largest
    is_known = ~(eigenvalues <= rounding)  # what is not a number stays so
    masked = jnp.where(is_known, eigenvalues, 1)
    return jnp.where(is_known, 1 / masked, 0)


def combined(
    directions: Formed, draw: Draw, weights: Array, chunk_size: int | None
) -> Tree:
    """Σ a v in at least float32, a tree like the parameters."""
    k = len(weights)
    chunks = _chunks(k, chunk_size)
    if len(chunks) == 1:
        total = directions.assemble(weights, draw(chunks[0]))
    else:
        padding = chunks.size - k  # the last direction once more, of weight zero
        padded = jnp.pad(weights, (0, padding)).reshape(chunks.shape)

        def add(total: Tree, chunk: tuple[Array, Array]) -> tuple[Tree, None]:
            indices, own = chunk
            return directions.add(total, own, draw(indices)), None

        total, _ = lax.scan(add, _zeros(directions.point), (chunks, padded))
    # Sums of directions are conjugate, as gradients are; the step is not.
    return _tree.conjugate(total)


def _zeros(params: Tree) -> Tree:
    """Zeros like the parameters, in at least float32."""

    def zero(leaf: Array) -> Array:
        return jnp.zeros(leaf.shape, _tree.accumulation_dtype(leaf.dtype))

    return jax.tree.map(zero, params)
