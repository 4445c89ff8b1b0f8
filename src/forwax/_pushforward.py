"""The one primitive: a function's value once, and its slopes along k tangents, in chunks of bounded memory.

A slope is the directional derivative <g, v> that one Jacobian-vector product returns. `jax.vmap` of
`jax.jvp` over the tangents leaves the primal unbatched, so that k tangents cost one evaluation and
k tangent passes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import jaxpr_as_fun

from forwax import _mesh, _tree
from forwax._tree import Tree

Objective = Callable[[Tree], tuple[Array, Tree]]


def pushforward(
    objective: Objective,
    primals: Tree,
    tangents: Callable[[Array], Tree],
    num_tangents: int,
    *,
    chunk_size: int | None = None,
    fold: Callable[[Tree, Array, Tree], Tree] | None = None,
    start: Tree = None,
) -> tuple[Array, Tree, Array, Tree]:
    """Evaluate an objective and its slopes along k tangents.

    Args:
        objective: takes primals to `(value, aux)`, a real scalar and a pytree of arrays.
        primals: the point, a pytree of floating or complex arrays.
        tangents: takes indices [c] to a tree like primals with leading axis c. Indices past k - 1
            may be asked for to fill the last chunk; what comes back for them is replaced by zeros.
        num_tangents: k.
        chunk_size: the most tangents at a time; None for all at once. The primal is evaluated once
            per chunk. Chunks are of equal size, so that as little as possible is evaluated in vain.
        fold: takes `(total, slopes [c], tangents)` of a chunk to a new total, so that no more than
            one chunk of tangents need be held.
        start: the first total.

    Returns:
        `(value, aux, slopes [k], total)`, the slopes in at least float32.

    Outside a trace the chunks are a Python loop, so that the objective may branch on concrete
    values. Inside one they are a `lax.scan`, with an optimisation barrier that keeps XLA from
    hoisting the primal out of the loop: hoisted, every activation would be stored for all chunks.

    Example:
        >>> import jax.numpy as jnp
        >>> f = lambda x: (jnp.sum(x**2), None)
        >>> rows = jnp.eye(3)
        >>> value, _, slopes, _ = pushforward(f, jnp.array([1.0, 2.0, 3.0]), lambda i: rows[i], 3)
        >>> float(value), slopes.tolist()
        (14.0, [2.0, 4.0, 6.0])
    """
    num_chunks = -(-num_tangents // (chunk_size or num_tangents))
    size = -(-num_tangents // num_chunks)
    keep = fold or (lambda total, slopes, tangents: total)

    def chunk(total: Tree, first: Any, point: Tree) -> tuple[Tree, tuple[Array, Tree, Array]]:
        indices = first + jnp.arange(size)
        directions = tangents(indices)
        if num_chunks * size > num_tangents:
            directions = jax.tree.map(lambda x: _cut(x, indices < num_tangents), directions)
        if num_chunks > 1:
            point, directions = _barrier(point, directions)
        value, aux, slopes = _slopes(objective, point, directions, size)
        return keep(total, slopes, directions), (value, aux, slopes)

    if num_chunks == 1:
        total, (value, aux, slopes) = chunk(start, 0, primals)
        return value, aux, slopes, total
    if is_concrete(primals):
        return _loop(
            lambda total, first: chunk(total, first, primals),
            start,
            num_chunks,
            size,
            num_tangents,
        )

    def step(total: Tree, first: Array) -> tuple[Tree, tuple[Array, Array], Tree]:
        total, (value, aux, slopes) = chunk(total, first, primals)
        return total, (value, slopes), aux

    total, (values, slopes), aux = scan_with_aux(step, start, jnp.arange(num_chunks) * size)
    return values[0], aux, slopes.reshape(-1)[:num_tangents], total


def scan_with_aux(
    step: Callable[[Tree, Array], tuple[Tree, Tree, Tree]],
    start: Tree,
    xs: Array,
    *,
    reverse: bool = False,
) -> tuple[Tree, Tree, Tree]:
    """`lax.scan` of a step to `(carry, out, aux)`, which keeps the aux of the step that comes last alone.

    An aux may be as large as the activities: it is carried, not stacked. Its form is known once the
    step is traced, and the loop runs that trace, so that the user's loss is not traced again.
    """
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(start, xs[0])
    run, structure = jaxpr_as_fun(traced), jax.tree.structure(shapes)
    avals = traced.out_avals[structure.num_leaves - len(jax.tree.leaves(shapes[2])) :]
    unset = [_mesh.vary(jnp.zeros(aval.shape, aval.dtype), _mesh.type_axes(aval)) for aval in avals]

    def body(state: tuple[Tree, list[Array]], x: Array) -> tuple[tuple[Tree, list[Array]], Tree]:
        carry, out, aux = structure.unflatten(run(*jax.tree.leaves((state[0], x))))
        return (carry, jax.tree.leaves(aux)), out

    (carry, leaves), outs = lax.scan(body, (start, unset), xs, reverse=reverse)
    return carry, outs, jax.tree.unflatten(jax.tree.structure(shapes[2]), leaves)


def _loop(
    chunk: Callable, total: Tree, num_chunks: int, size: int, k: int
) -> tuple[Array, Tree, Array, Tree]:
    total, (value, aux, slopes) = chunk(total, 0)
    found = [slopes]
    for i in range(1, num_chunks):
        total, (_, _, slopes) = chunk(total, i * size)
        found.append(slopes)
    return value, aux, jnp.concatenate(found)[:k], total


def _slopes(
    objective: Objective, primals: Tree, tangents: Tree, size: int
) -> tuple[Array, Tree, Array]:
    """One chunk: the value, aux and slopes [size] in at least float32."""

    def push(tangent: Tree) -> tuple[Array, Array, Tree]:
        return jax.jvp(objective, (primals,), (tangent,), has_aux=True)

    if size == 1:  # no batch axis: the plain JVP, also for functions without a batching rule
        value, slope, aux = push(jax.tree.map(lambda x: x[0], tangents))
        slopes = slope[None]
    else:
        value, slopes, aux = jax.vmap(push, out_axes=(None, 0, None), axis_size=size)(tangents)
    return value, aux, slopes.astype(_tree.accumulation_dtype(slopes.dtype))


def _barrier(point: Tree, directions: Tree) -> tuple[Tree, Tree]:
    """Tie primals to directions leaf by leaf: behind one barrier all would vary over the same mesh axes."""
    leaves, structure = jax.tree.flatten(point)
    pairs = [
        lax.optimization_barrier(pair)
        for pair in zip(leaves, jax.tree.leaves(directions), strict=True)
    ]
    points, tangents = zip(*pairs, strict=True) if pairs else ((), ())
    return structure.unflatten(points), structure.unflatten(tangents)


def _cut(tangents: Array, used: Array) -> Array:
    """Zeros in place of the directions that only fill the last chunk."""
    return jnp.where(used.reshape(-1, *[1] * (tangents.ndim - 1)), tangents, 0)


def is_concrete(tree: Tree) -> bool:
    """Whether no leaf is abstract and no trace of a whole program, such as `jit`, is running."""
    return not is_staged() and not any(map(is_abstract, jax.tree.leaves(tree)))


def is_staged() -> bool:
    """Whether a trace of a whole program, such as `jit`, is running; `vmap` and `jvp` alone are none."""
    return is_abstract(
        jnp.zeros(())
    )  # abstract under jit even when every leaf is a captured constant


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf is a tracer that has no value yet."""
    if not isinstance(leaf, jax.Array):
        return False
    try:
        leaf.addressable_data(0)
    except jax.errors.ConcretizationTypeError:
        return True
    return False
