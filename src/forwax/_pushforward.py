"""The one primitive: a function's value once, and its slopes along k tangents, in chunks.

A slope is the directional derivative <g, v> that one Jacobian-vector product returns. `jax.vmap` of
`jax.jvp` over the tangents leaves the primal unbatched, so that k tangents cost one evaluation and
k tangent passes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._programs.tracing import staged
from forwax._tree import Tree

Objective = Callable[[Tree], tuple[Array, Tree]]

Pushed = tuple[Array, Tree, Array]
"""Value, aux and slopes."""

Step = Callable[[Any, Array], tuple[Any, Any, Any]]
"""Takes a carry and what a step gets to `(carry, out, aux)`."""


class Directions(Protocol):
    """What slopes are taken along: arrays, or what a traced loss forms where it uses it.

    What is drawn is a tree of arrays, [c, ...] for c tangents. Σ c v takes weights [c], or
    [c, examples] where examples have directions of their own.
    """

    @property
    def point(self) -> Tree:
        """What the loss is evaluated at."""
        ...

    @property
    def is_concrete(self) -> bool:
        """Whether the loss may branch on concrete values, so that it must not be staged."""
        ...

    @property
    def num_examples(self) -> int:
        """How many examples have directions of their own; 1 where all share them."""
        ...

    @property
    def most_held(self) -> int | None:
        """Up to how many it is better to hold for their sum than to draw again; None for any."""
        ...

    @property
    def together(self) -> int:
        """How many are best added at a time, where they are drawn again."""
        ...

    def at(self, point: Any, /) -> Self:
        """The same at another point."""
        ...

    def sampler(self, key: Array, /) -> Callable[[Array], Any]:
        """How directions are drawn: a function of their indices [c].

        They depend on key and index alone, so that they can be drawn twice.
        """
        ...

    def push(self, drawn: Any, num_tangents: int) -> Pushed:
        """`(value, aux, slopes)`, the slopes [c] or [c, examples] in at least float32."""
        ...

    def assemble(self, weights: Any, drawn: Any) -> Tree:
        """Σ c v, a tree like the parameters in at least float32."""
        ...

    def add(
        self,
        total: Tree,
        weights: Any,
        drawn: Any,
    ) -> Tree:
        """Total + Σ c v, each entry rounded to its type."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Along:
    """What one evaluation along k directions gives.

    Attributes:
        value: the loss.
        aux: its aux.
        found: the slopes [k] or [k, examples], in at least float32.
        used: the same after the guard.
        total: Σ c v, or None where nothing was weighed.
    """

    value: Array
    aux: Tree
    found: Array
    used: Array
    total: Tree


def num_chunks(num_tangents: int, chunk_size: int | None) -> int:
    """How many chunks k tangents are cut into."""
    return -(-num_tangents // (chunk_size or num_tangents))


def slopes(
    directions: Directions,
    draw: Callable[[Array], Any],
    num_tangents: int,
    *,
    chunk_size: int | None = None,
    sum_to: _mesh.Axes | None = None,
    guard: Callable[[Array], Array] | None = None,
    weigh: Callable[[Array, Any], Any] | None = None,
    start: Callable[[], Tree] = lambda: None,
) -> Along:
    """Evaluate a loss and its slopes along k directions, and their weighted sum.

    Args:
        directions: the loss, and how it is pushed.
        draw: takes indices [c] to directions: `directions.sampler(key)`, or others.
        num_tangents: k.
        chunk_size: the most directions at a time; None for all at once. The primal is evaluated
            once per chunk. Chunks are of equal size, so that as little as possible is evaluated in
            vain.
        sum_to: the mesh axes over which slopes may vary; they are summed over all others. None
            leaves them as they are.
        guard: what is done to slopes, elementwise, before they are used.
        weigh: takes the slopes [c, ...] of a chunk and what was drawn for it to the weights of the
            sum, so that no more than one chunk of directions need be held.
        start: makes the sum of none, where there are several chunks.

    Outside a trace the chunks are a Python loop, so that the objective may branch on concrete
    values. Inside one they are a `lax.scan`, with an optimisation barrier that keeps XLA from
    hoisting the primal out of the loop: hoisted, every activation would be stored for all chunks.
    """
    chunks = num_chunks(num_tangents, chunk_size)
    size = -(-num_tangents // chunks)

    def push(here: Directions, drawn: Any) -> Pushed:
        value, aux, found = here.push(drawn, size)
        if sum_to is not None:  # inside `jax.shard_map`
            others = _mesh.axes(found) - sum_to
            found = _mesh.total(found, others)
        return value, aux, found

    def guarded(found: Array) -> Array:
        return found if guard is None else guard(found)

    if chunks == 1:  # neither a loop nor a barrier: the primal is evaluated once
        drawn = draw(jnp.arange(num_tangents))
        value, aux, found = push(directions, drawn)
        used = guarded(found)
        total = None
        if weigh is not None:
            weights = weigh(used, drawn)
            total = directions.assemble(weights, drawn)
        return Along(value, aux, found, used, total)

    def chunk(total: Tree, first: Array) -> tuple[Tree, Any, Tree]:
        indices = first + jnp.arange(size)
        is_used = indices < num_tangents
        # What only fills the last chunk is the last direction once more, with a weight of zero.
        if chunks * size > num_tangents:
            indices = jnp.minimum(indices, num_tangents - 1)
        drawn = draw(indices)
        here, drawn = _tied(directions, drawn)
        value, aux, found = push(here, drawn)
        if weigh is not None:
            weights = weigh(guarded(found), drawn)
            weights = _cut(weights, is_used)
            total = here.add(total, weights, drawn)
        return total, (value, found), aux

    total, outs, aux = in_turn(
        chunk,
        start(),
        jnp.arange(chunks) * size,
        as_scan=not directions.is_concrete,
    )
    values, found = outs
    found = found.reshape(-1, *found.shape[2:])  # from [chunks, size, ...]
    found = found[:num_tangents]
    used = guarded(found)
    return Along(values[0], aux, found, used, total)


def _tied(directions: Directions, drawn: Any) -> tuple[Directions, Any]:
    """The directions' point and what was drawn, each known only when the other is.

    One barrier for each set of mesh axes: behind the same one all would vary over the same axes.
    """
    both = (directions.point, drawn)
    leaves, structure = jax.tree.flatten(both)
    axes = [_mesh.axes(leaf) for leaf in leaves]
    for over in dict.fromkeys(axes):
        members = [i for i, own in enumerate(axes) if own == over]
        values = [leaves[i] for i in members]
        tied = lax.optimization_barrier(values)
        for i, value in zip(members, tied, strict=True):
            leaves[i] = value
    point, drawn = structure.unflatten(leaves)
    return directions.at(point), drawn


def _cut(weights: Tree, used: Array) -> Tree:
    """Weights [c, ...], with zeros for the directions that only fill the last chunk."""

    def cut(x: Array) -> Array:
        ones = [1] * (x.ndim - 1)
        mask = used.reshape(-1, *ones)
        return jnp.where(mask, x, 0)

    return jax.tree.map(cut, weights)


def over_tangents(
    f: Callable[[Tree], tuple[Tree, Tree]],
    tangents: Tree,
    num_tangents: int,
    *,
    check: bool = False,
) -> tuple[Tree, Tree]:
    """Apply a function to each of k tangents: `jax.vmap`, but a single one gets no batch axis.

    So functions without a batching rule serve too, and k = 1 costs what one call costs.

    Args:
        f: takes one tangent to `(each, shared)`: what depends on it, and what does not.
        tangents: a tree with a leading axis k.
        num_tangents: k.
        check: whether inside `jit` a single one is traced first, to find a custom_vjp function at
            once; several find it themselves.

    Returns:
        `(each, shared)`, the first with a leading axis k.
    """
    if num_tangents > 1:
        axes = (0, None)
        mapped = jax.vmap(f, out_axes=axes, axis_size=num_tangents)
        return mapped(tangents)
    only = jax.tree.map(lambda x: x[0], tangents)
    if check and is_staged():
        f, _ = staged(f, only)
    each, shared = f(only)
    return jax.tree.map(lambda x: x[None], each), shared


def along(run: Callable[[Array], tuple[Tree, Tree]]) -> tuple[Tree, Tree, Tree]:
    """What a run gives, its derivative over time, and its aux.

    Args:
        run: takes the time, which scales every tangent that `inject` lets in, to `(outputs, aux)`.
    """
    time = jnp.zeros((), jnp.float32)
    rate = time + 1
    return jax.jvp(run, (time,), (rate,), has_aux=True)


def in_turn(
    step: Step,
    start: Tree,
    xs: Array,
    *,
    as_scan: bool,
    reverse: bool = False,
) -> tuple[Tree, Tree, Tree]:
    """Steps one after the other: a scan, or a Python loop where the loss may branch on values.

    Args:
        step: takes a carry and one of `xs` to `(carry, out, aux)`.
        start: the first carry.
        xs: what each step gets, stacked.
        as_scan: whether it is a scan, which traces the step once.
        reverse: whether a scan runs backwards, so that its aux is that of the first step.

    Returns:
        `(carry, stacked outputs, aux)`, the aux of one step: the first in a Python loop, the last
        in a scan.
    """
    if as_scan:  # its aux is carried, not stacked
        return scan_with_aux(step, start, xs, reverse=reverse)
    carry, out, aux = step(start, xs[0])
    outs = [out]
    for x in xs[1:]:
        carry, out, _ = step(carry, x)
        outs.append(out)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
    return carry, stacked, aux


def scan_with_aux(
    step: Step,
    start: Tree,
    xs: Array,
    *,
    reverse: bool = False,
) -> tuple[Tree, Tree, Tree]:
    """`lax.scan` of a step, which keeps the aux of the step that comes last alone.

    An aux may be as large as the activities: it is carried, not stacked. Its form is known once the
    step is traced, and the loop runs that trace, so that the user's loss is not traced again.
    """
    run, shapes = staged(step, start, xs[0])
    _, _, aux = shapes
    avals, structure = jax.tree.flatten(aux)

    def zeros(aval: Any) -> Array:
        over = _mesh.type_axes(aval)
        return _mesh.vary(jnp.zeros(aval.shape, aval.dtype), over)

    def body(state: Any, x: Array) -> tuple[Any, Tree]:
        carry, _ = state  # the last step's aux is dropped
        carry, out, aux = run(carry, x)
        return (carry, jax.tree.leaves(aux)), out

    unset = [zeros(aval) for aval in avals]
    state, outs = lax.scan(body, (start, unset), xs, reverse=reverse)
    carry, leaves = state
    return carry, outs, structure.unflatten(leaves)


def is_concrete(tree: Tree) -> bool:
    """Whether no leaf is abstract and no trace of a whole program, such as `jit`, is running."""
    leaves = jax.tree.leaves(tree)
    return not is_staged() and not any(map(_tree.is_abstract, leaves))


def is_staged() -> bool:
    """Whether a trace of a whole program, such as `jit`, is running; `vmap` alone is none."""
    # abstract under jit even when every leaf is a captured constant
    return _tree.is_abstract(jnp.zeros(()))
