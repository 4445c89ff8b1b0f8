"""What is never held in full, gathered: the noise that sites draw one by one, and tangents in factors."""

import jax
import jax.numpy as jnp

from forwax._directions.factored import Factored
from forwax._directions.signs import unpacked
from forwax._sites.levels import LoopPlan
from forwax._sites.passes.replay import like
from forwax._sites.regions import Region


def noise_of(sites, source):
    """The noise that each site draws for itself, as one array a site: [k, examples, loops, ...]."""
    found = {}

    def visit(level, source, wrap):
        for step in level.steps:
            if isinstance(step, Region):
                for site in (s for s in sites.noisy if s.region is step):
                    found[site.variable] = wrap(
                        lambda own, site=site: own.all(
                            site.variable, like(sites, site), jnp.zeros(())
                        ),
                        site,
                    )(source)
            elif isinstance(step, LoopPlan):
                visit(
                    step.level,
                    source,
                    lambda f, site, plan=step, wrap=wrap: wrap(_each_step(f, plan, site), site),
                )

    def _each_step(f, plan, site):
        axis = 1 + (site.mapped and sites.num_examples is not None)
        return lambda own: jax.vmap(lambda t: f(own.inside(plan, t)), out_axes=axis)(
            own.slices(plan)
        )

    visit(sites.level, source.at_level(sites.level), lambda f, site: f)
    return [found[site.variable] for site in sites.noisy]


def dense(plan, drawn):
    """The tangents [k, ...] that a `WeightPlan` never forms, as a tree of the parameters' structure."""

    def one(drawn):
        pairs = zip(plan.leaves, plan.tangents(unpacked(drawn)), strict=True)
        return [t.dense(leaf.shape) if isinstance(t, Factored) else t for leaf, t in pairs]

    return jax.tree.unflatten(jax.tree.structure(plan.problem.params), jax.vmap(one)(list(drawn)))
