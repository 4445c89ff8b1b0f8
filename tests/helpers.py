"""What several test files need, and what is never held in full, gathered.

That is the noise that sites draw one by one, and tangents in factors.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax import _tree
from forwax._signature import Signature
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.noise import Drawn
from forwax._sites.passes.keep import forward
from forwax._sites.passes.replay import like
from forwax._sites.regions import Region
from forwax._sites.sources import tangent_program
from forwax.tangents._base import typed_key

KEY = jax.random.key(0)


def module_at(path: Path) -> ModuleType:
    """A Python file that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs_extra(name, module):
    """Skip where an extra is missing, but where .ci/run says that it is there."""
    if os.environ.get("FORWAX_EXTRA") != name:
        pytest.importorskip(module, reason=f"needs pip install 'forwax[{name}]'")


def problem_of(program):
    """What a rule is given of one of `sites.programs`."""
    return Signature(program.loss, 0, False, program.in_axes).bind(program.args, {})


def norm(tree) -> float:
    """The length of all leaves together; by NumPy, which compiles nothing."""
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))


def estimates(program, *rules, key=KEY):
    """Value and gradients by each rule: one compiled program, and arrays of NumPy."""

    def every(key, *args):
        made = (
            fx.value_and_grad(program.loss, rule, **program.options) for rule in rules
        )
        return [estimate(key, *args) for estimate in made]

    return jax.device_get(jax.jit(every)(key, *program.args))


def basis_of(program, rule):
    """A rule with every coordinate of its noise once: its estimate is the mean over all noise."""
    return rule.basis(problem_of(program))


def jacobians_of(sites, problem, example=0):
    """Of the sources by the noises, for one example: [source][noise], [*source, *noise]."""
    program = tangent_program(sites, sites.sources.starts)
    mapped = [
        np.take(np.asarray(x), example, axis=axis)
        for x, axis in zip(problem.mapped, problem.mapped_axes, strict=True)
    ]
    leaves = [*program.closed, *jax.tree.leaves(problem.params), *mapped]
    level = Level(program.program, (), frozenset(), {})
    noises = [np.zeros(site.shape, site.dtype) for site in sites.noisy]
    tangents = lambda noises: forward(level, [*leaves, *noises], {}, None, frozenset())[
        0
    ]
    return jax.device_get(jax.jit(jax.jacfwd(tangents))(noises))


def leak(sites, problem, example=0):
    """The largest derivative that the credit calls zero."""
    if not sites.credit:
        return 0.0
    jacobians = jacobians_of(sites, problem, example)
    worst = 0.0
    for j, site in enumerate(sites.noisy):
        for credit in sites.credit[site.variable]:
            jacobian = np.abs(np.asarray(jacobians[credit.source][j]))
            for axis, link in credit.links:
                for position in range(credit.shape[axis]):
                    part = jacobian.take(position, axis=axis)
                    other = (position < link.first) | (position > link.last)
                    if link.axis is None:
                        part = part * other
                    else:
                        own_axis = len(credit.shape) - 1 + link.axis
                        part = part.take(np.flatnonzero(other), axis=own_axis)
                    worst = max(worst, float(part.max(initial=0)))
        reached = {credit.source for credit in sites.credit[site.variable]}
        for number in set(range(len(jacobians))) - reached:
            worst = max(worst, float(np.abs(jacobians[number][j]).max(initial=0)))
    return worst


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given(fx.tangents.Tangents):
    """Noise that is given, [k, *shape] for each place: all of one shape are asked for at once."""

    noise: list[jax.Array]
    coordinatewise: ClassVar[bool] = True

    def draw(self, key, specs, num_tangents):
        stacks = {}
        for u in self.noise:
            stacks.setdefault((u.shape, u.dtype), []).append(u)
        return jax.vmap(_tree.to_real)(
            [jnp.stack(stack, axis=1) for stack in stacks.values()]
        )

    def relative_mse(self, n, num_tangents):
        return 1.0


def noise_of(rule, sites, key):
    """The noise that each site draws for itself, as one array a site: [k, examples, loops, ...]."""

    def draw(key, like):
        real = rule.tangents.draw_one(key, _tree.real_specs([like]))
        return _tree.from_real(real, [like])[0]

    source = Drawn(typed_key(key), draw, rule.num_tangents)
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
                    lambda f, site, plan=step, wrap=wrap: wrap(
                        _each_step(f, plan, site), site
                    ),
                )

    def _each_step(f, plan, site):
        axis = 1 + (site.mapped and sites.num_examples is not None)
        return lambda own: jax.vmap(lambda t: f(own.inside(plan, t)), out_axes=axis)(
            own.slices(plan)
        )

    visit(sites.level, source.at_level(sites.level), lambda f, site: f)
    return [found[site.variable] for site in sites.noisy]


def dense(plan, drawn):
    """What a `WeightPlan` never forms: the tangents [k, ...], as a tree like the parameters."""

    def one(drawn):
        pairs = zip(plan.leaves, plan.directions(drawn), strict=True)
        return [direction.dense(leaf.shape) for leaf, direction in pairs]

    return jax.tree.unflatten(
        jax.tree.structure(plan.problem.params), jax.vmap(one)(list(drawn))
    )
