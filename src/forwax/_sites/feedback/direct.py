"""Gradients by maps from the outlets to the inlets, and what noise at the inlets does."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.evaluate import Values, read
from forwax._programs.program import Variable
from forwax._pushforward import along, over_tangents
from forwax._sites.feedback.crossing import WayBack, forward
from forwax._sites.feedback.inlets import Routes
from forwax._sites.passes import keep
from forwax._tree import Tree
from forwax.tangents import Tangents
from forwax.tangents._base import sampler

Backward = Callable[[list[Array]], list[Array]]
"""Takes the outlets' exact errors to the inlets' errors."""


def estimate(
    routes: Routes, errors_of: Backward, mirrors: Sequence[Array] = ()
) -> tuple[Array, Tree, Tree]:
    """`(value, aux, grads)` with errors from outside at the inlets.

    Reverse mode crosses all that has no parameter, the last products, and those with mirrors.
    """
    sites = routes.sites
    way = routes.way_back(mirrors)

    def objective(params: Tree) -> tuple[Any, Any]:
        losses, taps, aux, records = _run(routes, way, params, routes.tail.records)
        return (keep.value(sites, losses), taps), (aux, records)

    params = sites.problem.params
    (value, taps), pull, (aux, records) = jax.vjp(objective, params, has_aux=True)
    # The tail is run once more: the errors must be there before the one reverse pass.
    exact = keep.errors_at(sites, routes.tail, records)
    errors = errors_of([exact[outlet.start] for outlet in routes.outlets])
    # Inside shard_map a cotangent varies over the mesh axes of its value.
    one = _mesh.vary(jnp.ones_like(value), _mesh.axes(value))
    cotangents = {
        number: _mesh.vary(error, _mesh.axes(taps[number]))
        for number, error in enumerate(errors)
    }
    (grads,) = pull((one, cotangents))
    return value, aux, grads


def _run(
    routes: Routes,
    way: WayBack,
    params: Tree,
    wanted: Iterable[Variable],
    noise: Mapping[int, Array] | None = None,
    time: Array | None = None,
) -> tuple[list[Array], dict[int, Array], Tree, Values]:
    """`(losses, taps, aux, wanted values)`, examples on a leading axis of each."""
    sites = routes.sites
    names = {outlet.start: outlet.variable for outlet in routes.outlets}

    def one(
        mapped: Sequence[Array], noise: Mapping[int, Array] | None
    ) -> tuple[list[Array], dict[int, Array], Tree, Values]:
        inputs = sites.traced.arguments(params, mapped)
        env, taps = forward(sites.level, inputs, way, noise, time)
        outputs = [read(atom, env) for atom in sites.level.program.outputs]
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs)
        return losses, taps, aux, {v: env[names.get(v, v)] for v in wanted}

    if sites.num_examples is None:
        return one((), noise)
    inlet_axes = {n: 0 if i.mapped else None for n, i in enumerate(routes.inlets)}
    value_axes = {v: sites.axis_of(v) for v in wanted}
    each = jax.vmap(
        one,
        in_axes=(list(sites.problem.mapped_axes), inlet_axes if noise else None),
        out_axes=(0, {} if noise else inlet_axes, 0, value_axes),
        axis_size=sites.num_examples,
    )
    return each(list(sites.problem.mapped), noise)


@dataclasses.dataclass(frozen=True, eq=False)
class Pushed:
    """What noise at the inlets does.

    Attributes:
        noise: what entered at each inlet, [k, *examples, *shape].
        tangents: of each outlet, [k, *examples, *shape].
        slopes: the tangents of the losses, [k, *examples, *shape].
    """

    noise: list[Array]
    tangents: list[Array]
    slopes: list[Array]


def push(
    routes: Routes,
    noise: Sequence[Array],
    num_tangents: int,
) -> Pushed:
    """Push noise at the inlets, [k, *examples, *shape], through the loss."""
    if not routes.inlets:  # all errors are exact, or cross mirrors
        return Pushed([], [], [])
    params = routes.sites.problem.params
    starts = [outlet.start for outlet in routes.outlets]

    def slopes(noise: Mapping[int, Array]) -> tuple[Any, None]:
        def values(time: Array) -> tuple[Any, None]:
            losses, _, _, found = _run(
                routes, routes.way_back(), params, starts, noise, time
            )
            return ([found[start] for start in starts], losses), None

        return along(values)[1], None

    named = dict(enumerate(noise))
    (tangents, of_losses), _ = over_tangents(slopes, named, num_tangents)
    return Pushed(list(noise), tangents, of_losses)


def draw(
    routes: Routes, tangents: Tangents, key: Array, num_tangents: int
) -> list[Array]:
    """The noise of each inlet, [k, *examples, *shape]."""
    if not routes.inlets:
        return []
    specs = []
    for inlet in routes.inlets:
        shape = inlet.shape
        if inlet.mapped and routes.sites.num_examples is not None:
            shape = (routes.sites.num_examples, *shape)
        specs.append(_mesh.like(shape, inlet.dtype, inlet.axes))
    return sampler(tangents, key, specs, num_tangents, hold=True)(
        jnp.arange(num_tangents)
    )


def num_coordinates(routes: Routes) -> int:
    """The number of real coordinates of one noise."""
    total = 0
    for inlet in routes.inlets:
        count = _tree.num_coordinates(inlet.spec)
        if inlet.mapped and routes.sites.num_examples is not None:
            count *= routes.sites.num_examples
        total += count
    return total
