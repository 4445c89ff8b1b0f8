"""Slopes along noise that each site draws when it is visited, so that nothing is kept."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax import _mesh, _tree
from forwax.sites.noise import Drawn
from forwax.sites.order import behind
from forwax.sites.plan import Level, LoopPlan
from forwax.sites.program import Variable
from forwax.sites.regions import Region
from forwax.sites.run import Values, inject
from forwax.sites.sites import Pass, Site, Sites, push_along
from forwax.sites.walk import Batch, scan, walk


def like(sites: Sites, site: Site) -> Any:
    """What a site's noise in one step of the loops around it is like, all examples together."""
    lead = (sites.num_examples,) if sites.num_examples is not None and site.mapped else ()
    return _mesh.like((*lead, *sites.own_shape(site)), site.dtype, site.axes)


def batch_of(sites: Sites) -> Batch:
    """Which values have an axis of examples."""
    return Batch(frozenset(sites.mapped), sites.num_examples)


def inputs_of(sites: Sites) -> Values:
    """The values of the program's inputs for all examples."""
    mapped = [
        jnp.moveaxis(x, a, 0)
        for x, a in zip(sites.problem.mapped, sites.problem.mapped_axes, strict=True)
    ]
    values = [*sites.traced.closed, *jax.tree.leaves(sites.problem.params), *mapped]
    return dict(zip(sites.level.program.inputs, values, strict=True))


def table_of(sites: Sites) -> dict[Variable, Site]:
    """The sites by their variable."""
    return {site.variable: site for site in sites.places}


def push_drawn(sites: Sites, noise: Drawn) -> Pass:
    """As `Sites.push`, with noise that is drawn at each site; of the records only those of the tail."""
    run = functools.partial(_evaluate, sites, noise)
    return push_along(
        run, np.arange(noise.num_tangents), noise.num_tangents
    )  # NumPy's: a single index is a constant


def _evaluate(sites: Sites, noise: Drawn, index: Any, time: Array) -> tuple[Any, Any]:
    """`((losses, sums of losses, sources), (aux, records))`; each with a leading axis of examples."""
    batch, env = batch_of(sites), inputs_of(sites)
    outputs = _Push(sites, table_of(sites), batch, noise.at_level(sites.level), index, time).run(
        sites.level, env
    )
    outputs = [
        batch.spread(x, atom) for x, atom in zip(outputs, sites.level.program.outputs, strict=True)
    ]
    losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs)
    lead = 0 if batch.size is None else 1
    sums = [
        jnp.sum(x.astype(_tree.accumulation_dtype(x.dtype)), tuple(range(lead, x.ndim)))
        for x in losses
    ]
    taps = [env[v] for v in sites.sources.starts] if sites.sources is not None else []
    return (losses, sums, taps), (aux, {v: lax.stop_gradient(env[v]) for v in sites.tail_records})


@jax.custom_jvp
def _inject(value: Array, noise: Array, time: Array) -> Array:
    """As `inject`, but the value goes on only when its tangents are there too."""
    return value


@_inject.defjvp
def _inject_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    out, tangent = jax.jvp(inject, primals, tangents)
    return behind(out, [tangent]), tangent


@dataclasses.dataclass(frozen=True, eq=False)
class _Push:
    """A forward pass that lets noise in."""

    sites: Sites
    table: Mapping[Variable, Site]
    batch: Batch
    noise: Drawn
    index: Any
    time: Array

    def run(self, level: Level, env: Values) -> list[Any]:
        return walk(level, env, self.batch, self.at_region, self.at_loop)

    def at_region(self, region: Region, env: Values) -> None:
        for v in region.outputs:
            if not self.table[v].exact:
                noise = self.noise.one(v, like(self.sites, self.table[v]), self.index, env[v])
                env[v] = _inject(env[v], noise, self.time)

    def at_loop(self, plan: LoopPlan, env: Values) -> list[Any]:
        def step(inner: Values, state: None, counter: Any) -> tuple[list[Any], None, None]:
            push = dataclasses.replace(self, noise=self.noise.inside(plan, counter))
            return push.run(plan.level, inner), None, None

        return scan(plan, env, self.batch, step, None, self.noise.slices(plan))[0]
