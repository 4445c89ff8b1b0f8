"""A second forward pass that assembles each site's gradient as it goes by.

It visits the sites one by one with the values of all examples, takes a region's own reverse pass as
soon as the region has been evaluated, and goes on only when that is done, so that nothing older is
ever kept. What the regions' reverse passes leave at chains of parameters goes back to the leaves at
the end; inside a loop, in each step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._tree import Tree
from forwax.sites.chains import chains, has_sites, parameters_read
from forwax.sites.classify import Kind
from forwax.sites.noise import Drawn, Held
from forwax.sites.order import behind
from forwax.sites.plan import Level, LoopPlan
from forwax.sites.program import Variable
from forwax.sites.push import batch_of, inputs_of, like, table_of
from forwax.sites.regions import Region
from forwax.sites.run import Values, local
from forwax.sites.sites import Site, Sites
from forwax.sites.walk import Batch, scan, walk

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
