"""Slopes along noise that each site draws when it is visited, so that nothing is kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax import _mesh, _tree
from forwax._programs.evaluate import Values, inject
from forwax._programs.order import behind
from forwax._programs.program import Variable
from forwax._sites.kinds import Kind
from forwax._sites.levels import Level, LoopPlan, chains, has_sites, parameters_read
from forwax._sites.model import Pass, Site, Sites
from forwax._sites.noise import Drawn, Held
from forwax._sites.passes.keep import local, push_along
from forwax._sites.passes.walk import Batch, scan, walk
from forwax._sites.regions import Region
from forwax._tree import Tree


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
    outputs = _DrawnPass(
        sites, table_of(sites), batch, noise.at_level(sites.level), index, time
    ).run(sites.level, env)
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
def _inject_in_order(value: Array, noise: Array, time: Array) -> Array:
    """As `inject`, but the value goes on only when its tangents are there too."""
    return value


@_inject_in_order.defjvp
def _inject_in_order_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    out, tangent = jax.jvp(inject, primals, tangents)
    return behind(out, [tangent]), tangent


@dataclasses.dataclass(frozen=True, eq=False)
class _DrawnPass:
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
                env[v] = _inject_in_order(env[v], noise, self.time)

    def at_loop(self, plan: LoopPlan, env: Values) -> list[Any]:
        def step(inner: Values, state: None, counter: Any) -> tuple[list[Any], None, None]:
            push = dataclasses.replace(self, noise=self.noise.inside(plan, counter))
            return push.run(plan.level, inner), None, None

        return scan(plan, env, self.batch, step, None, self.noise.slices(plan))[0]


Error: TypeAlias = Callable[[Site, Array], Array]
"""Takes a site and its noise [k, ...], inside a loop that of one step, to the objective's error there."""


def replay(
    sites: Sites, noise: Drawn | Held, exact: Mapping[Variable, Array], error: Error
) -> Tree:
    """The gradient from a forward pass of its own.

    Args:
        sites: the problem's sites.
        noise: the same as in the first pass.
        exact: the errors of the output sites.
        error: of the others.
    """
    leaves, structure = jax.tree.flatten(sites.problem.params)
    env, start = inputs_of(sites), len(sites.traced.closed)
    names = sites.level.program.inputs[start : start + len(leaves)]
    again = _Replay(
        sites, table_of(sites), batch_of(sites), noise.at_level(sites.level), exact, error
    )
    _, cotangents = again.run(sites.level, env, names)
    return structure.unflatten([cotangents[v] for v in names])


@dataclasses.dataclass(frozen=True, eq=False)
class _Replay:
    """A forward pass that assembles.

    `kept` are the values that the levels around need from this one, `found` the cotangents of its
    parameters so far.
    """

    sites: Sites
    table: Mapping[Variable, Site]
    batch: Batch
    noise: Drawn | Held
    exact: Mapping[Variable, Array]
    error: Error
    kept: frozenset[Variable] = frozenset()
    found: Values = dataclasses.field(default_factory=dict)

    def run(self, level: Level, env: Values, names: Sequence[Variable]) -> tuple[list[Any], Values]:
        """The level's outputs, and the cotangents of those of its inputs that are named; `env` gets all values."""
        kinds = self.sites.kinds
        chain = chains(level, kinds, parameters_read(level, kinds))
        here = dataclasses.replace(self, kept=self.kept | chain.all_records(), found={})
        outputs = walk(level, env, self.batch, here.at_region, here.at_loop)
        return outputs, _pulled(chain, env, here.found, names)

    def add(self, cotangents: Values) -> None:
        for v, x in cotangents.items():
            self.found[v] = self.found[v] + x if v in self.found else x

    def at_region(self, region: Region, env: Values) -> None:
        errors = {v: self.site_error(self.table[v], env[v]) for v in region.outputs}
        given = {v: env[v] for v in region.inputs if self.is_parameter(v)}

        def outputs(given: Values) -> Values:
            scope = {**{v: env[v] for v in region.inputs}, **given}
            made = self.batch.bind(region.equations, scope)
            return {v: made[v] for v in region.outputs}

        (cotangents,) = jax.vjp(outputs, given)[1](errors)
        env.update({v: behind(env[v], cotangents.values()) for v in region.outputs})
        self.add(cotangents)

    def site_error(self, site: Site, value: Array) -> Array:
        if site.exact:
            return self.exact[site.variable].astype(site.dtype)
        return self.error(
            site, self.noise.all(site.variable, like(self.sites, site), value)
        ).astype(site.dtype)

    def at_loop(self, plan: LoopPlan, env: Values) -> list[Any]:
        """In each step the body's constants add to running sums; slices get theirs at once."""
        entering = {
            v: a for v, a in [*plan.fixed.items(), *plan.scanned.items()] if self.is_parameter(v)
        }
        names = list(entering) if has_sites(plan) else []
        start = {v: _zeros(env[entering[v]]) for v in names if v in plan.fixed}  # type: ignore[index]

        def step(
            inner: Values, sums: Values, slices: Any
        ) -> tuple[list[Any], Values, tuple[Values, Values]]:
            body = dataclasses.replace(self, noise=self.noise.inside(plan, slices))
            outputs, cotangents = body.run(plan.level, inner, names)
            sums = {v: x + cotangents[v] for v, x in sums.items()}
            own = {v: cotangents[v] for v in names if v not in sums}
            return outputs, sums, (own, {v: inner[v] for v in self.kept if v in inner})

        outputs, sums, (own, records) = scan(
            plan, env, self.batch, step, start, self.noise.slices(plan)
        )
        env.update(records)
        self.add({entering[v]: x for v, x in [*sums.items(), *own.items()]})  # type: ignore[misc]
        return outputs

    def is_parameter(self, variable: Variable) -> bool:
        return self.sites.kinds[variable] is Kind.PARAMETER


def _pulled(chain: Level, env: Values, found: Values, names: Sequence[Variable]) -> Values:
    """Cotangents taken back through the chains of one level to those of its inputs that are named."""

    def values(given: Values) -> Values:
        scope = {**env, **given}
        local(chain, scope)
        return {v: scope[v] for v in found}

    outputs, pull = jax.vjp(values, {v: env[v] for v in names})
    return pull({v: found[v].astype(x.dtype) for v, x in outputs.items()})[0]


def _zeros(x: Array) -> Array:
    return _mesh.vary(jnp.zeros(x.shape, _tree.accumulation_dtype(x.dtype)), _mesh.axes(x))
