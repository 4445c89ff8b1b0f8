"""Two passes that keep nothing: slopes along noise that sites draw themselves, and the assembly."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.constants import constant_along
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
    lead = (
        (sites.num_examples,) if sites.num_examples is not None and site.mapped else ()
    )
    return _mesh.like((*lead, *sites.own_shape(site)), site.dtype, site.axes)


def batch_of(sites: Sites) -> Batch:
    """Which values have an axis of examples."""
    return Batch(frozenset(sites.mapped), sites.num_examples)


def inputs_of(sites: Sites) -> Values:
    """The values of the program's inputs for all examples."""
    problem = sites.problem
    # The axis of examples comes first.
    axes = zip(problem.mapped, problem.mapped_axes, strict=True)
    mapped = [jnp.moveaxis(x, axis, 0) for x, axis in axes]
    values = sites.traced.arguments(problem.params, mapped)
    return dict(zip(sites.level.program.inputs, values, strict=True))


def table_of(sites: Sites) -> dict[Variable, Site]:
    """The sites by their variable."""
    return {site.variable: site for site in sites.places}


def push_drawn(sites: Sites, noise: Drawn) -> Pass:
    """As `keep.push`, with noise that each site draws; of the records only those of the tail."""
    run = functools.partial(_evaluate, sites, noise)
    indices = np.arange(
        noise.num_tangents
    )  # NumPy's: a single index is a constant of the program
    return push_along(run, indices, noise.num_tangents)


def _evaluate(
    sites: Sites,
    noise: Drawn,
    index: Any,
    time: Array,
) -> tuple[Any, Any]:
    """`((losses, sums of losses, sources), (aux, records))`, examples on a leading axis of each."""
    level = sites.level
    batch = batch_of(sites)
    env = inputs_of(sites)
    drawn = noise.at_level(level)
    drawn_pass = _DrawnPass(
        sites=sites,
        table=table_of(sites),
        batch=batch,
        noise=drawn,
        index=index,
        time=time,
    )
    outputs = drawn_pass.run(level, env)
    atoms = level.program.outputs
    spread = [batch.spread(x, atom) for x, atom in zip(outputs, atoms, strict=True)]
    losses, aux = jax.tree.unflatten(sites.traced.out_tree, spread)
    sums = [_sum_of_each(x, batch) for x in losses]
    sources = () if sites.sources is None else sites.sources.starts
    records = {v: constant_along(time, env[v]) for v in sites.tail_records}
    return (losses, sums, [env[v] for v in sources]), (aux, records)


def _sum_of_each(loss: Array, batch: Batch) -> Array:
    """The sum of a loss's entries, for each example where there are examples."""
    lead = 0 if batch.size is None else 1
    wide = loss.astype(_tree.accumulation_dtype(loss.dtype))
    return jnp.sum(wide, tuple(range(lead, loss.ndim)))


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
            site = self.table[v]
            if not site.exact:
                noise = self.noise.one(v, like(self.sites, site), self.index, env[v])
                env[v] = _inject_in_order(env[v], noise, self.time)

    def at_loop(self, plan: LoopPlan, env: Values) -> list[Any]:
        def step(
            inner: Values, state: None, counter: Any
        ) -> tuple[list[Any], None, None]:
            of_step = dataclasses.replace(self, noise=self.noise.inside(plan, counter))
            return of_step.run(plan.level, inner), None, None

        outputs, _, _ = scan(plan, env, self.batch, step, None, self.noise.slices(plan))
        return outputs


Error: TypeAlias = Callable[[Site, Array], Array]
"""From a site and its noise [k, ...] to the objective's error there; inside a loop, of one step."""


def replay(
    sites: Sites,
    noise: Drawn | Held,
    exact: Mapping[Variable, Array],
    error: Error,
) -> Tree:
    """The gradient from a forward pass of its own, which assembles as it goes by.

    It visits the sites one by one with the values of all examples, takes a region's own reverse
    pass as soon as the region has been evaluated, and goes on only when that is done, so that
    nothing older is ever kept. What the regions' reverse passes leave at chains of parameters goes
    back to the leaves at the end; inside a loop, in each step.

    Args:
        sites: the problem's sites.
        noise: the same as in the first pass.
        exact: the errors of the output sites.
        error: of the others.
    """
    structure = jax.tree.structure(sites.problem.params)
    parameters = sites.traced.parameters
    drawn = noise.at_level(sites.level)
    again = _Replay(
        sites=sites,
        table=table_of(sites),
        batch=batch_of(sites),
        noise=drawn,
        exact=exact,
        error=error,
    )
    _, cotangents = again.run(sites.level, inputs_of(sites), parameters)
    return structure.unflatten([cotangents[v] for v in parameters])


@dataclasses.dataclass(frozen=True, eq=False)
class _Replay:
    """A forward pass that assembles.

    `kept` are the values that the levels around need from this one, `cotangents` those of its
    parameters so far.
    """

    sites: Sites
    table: Mapping[Variable, Site]
    batch: Batch
    noise: Drawn | Held
    exact: Mapping[Variable, Array]
    error: Error
    kept: frozenset[Variable] = frozenset()
    cotangents: Values = dataclasses.field(default_factory=dict)

    def run(
        self,
        level: Level,
        env: Values,
        names: Sequence[Variable],
    ) -> tuple[list[Any], Values]:
        """The level's outputs, and the cotangents of its named inputs; `env` gets all values."""
        kinds = self.sites.kinds
        chain = chains(level, kinds, parameters_read(level, kinds))
        kept = self.kept | chain.all_records()
        here = dataclasses.replace(self, kept=kept, cotangents={})
        outputs = walk(level, env, self.batch, here.at_region, here.at_loop)
        return outputs, _pulled(chain, env, here.cotangents, names)

    def add(self, cotangents: Values) -> None:
        for v, x in cotangents.items():
            if v in self.cotangents:
                x = self.cotangents[v] + x
            self.cotangents[v] = x

    def at_region(self, region: Region, env: Values) -> None:
        errors: Values = {}
        for v in region.outputs:
            errors[v] = self.site_error(self.table[v], env[v])
        parameters = {v: env[v] for v in region.inputs if self.is_parameter(v)}
        inputs = {v: env[v] for v in region.inputs}

        def outputs(parameters: Values) -> Values:
            computed = self.batch.bind(region.equations, {**inputs, **parameters})
            return {v: computed[v] for v in region.outputs}

        _, pull = jax.vjp(outputs, parameters)
        (cotangents,) = pull(errors)
        # Nothing goes on before this region's reverse pass is done: its inputs are free then.
        for v in region.outputs:
            env[v] = behind(env[v], cotangents.values())
        self.add(cotangents)

    def site_error(self, site: Site, value: Array) -> Array:
        if site.exact:
            return self.exact[site.variable].astype(site.dtype)
        noise = self.noise.all(site.variable, like(self.sites, site), value)
        return self.error(site, noise).astype(site.dtype)

    def at_loop(self, plan: LoopPlan, env: Values) -> list[Any]:
        """In each step the body's constants add to running sums; slices get theirs at once."""
        read = {**plan.fixed, **plan.scanned}
        entering = {v: atom for v, atom in read.items() if self.is_parameter(v)}
        names = list(entering) if has_sites(plan) else []
        fixed = [v for v in names if v in plan.fixed]
        scanned = [v for v in names if v not in plan.fixed]
        start = {v: _zeros(env[entering[v]]) for v in fixed}  # type: ignore[index]

        def step(
            inner: Values, sums: Values, slices: Any
        ) -> tuple[list[Any], Values, Any]:
            body = dataclasses.replace(self, noise=self.noise.inside(plan, slices))
            outputs, cotangents = body.run(plan.level, inner, names)
            sums = {v: total + cotangents[v] for v, total in sums.items()}
            of_step = {v: cotangents[v] for v in scanned}
            records = {v: inner[v] for v in self.kept if v in inner}
            return outputs, sums, (of_step, records)

        slices = self.noise.slices(plan)
        outputs, sums, (of_steps, records) = scan(
            plan, env, self.batch, step, start, slices
        )
        env.update(records)
        pulled = {**sums, **of_steps}
        self.add({entering[v]: x for v, x in pulled.items()})  # type: ignore[misc]
        return outputs

    def is_parameter(self, variable: Variable) -> bool:
        return self.sites.kinds[variable] is Kind.PARAMETER


def _pulled(
    chain: Level,
    env: Values,
    cotangents: Values,
    names: Sequence[Variable],
) -> Values:
    """Cotangents taken back through the chains of one level to its named inputs."""

    def values(inputs: Values) -> Values:
        scope = {**env, **inputs}
        local(chain, scope)
        return {v: scope[v] for v in cotangents}

    outputs, pull = jax.vjp(values, {v: env[v] for v in names})
    cast = {v: cotangents[v].astype(x.dtype) for v, x in outputs.items()}
    (pulled,) = pull(cast)
    return pulled


def _zeros(x: Array) -> Array:
    zeros = jnp.zeros(x.shape, _tree.accumulation_dtype(x.dtype))
    return _mesh.vary(zeros, _mesh.axes(x))
