"""Random small programs, none biased: `FORWAX_PROGRAMS=300 pytest tests/sites/test_random_programs.py` tries 300."""

import os

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from forwax._directions.plan import plan_low_rank, plan_signs
from forwax._signature import Signature

hypothesis = pytest.importorskip("hypothesis")
from sites.drawn import dense  # noqa: E402
from sites.random_programs import RECIPES, build, forward_only  # noqa: E402

KEY = jax.random.key(0)
RULES = {
    "keep": fx.ActivityPerturbation(),
    "no exact outputs": fx.ActivityPerturbation(exact_outputs=False),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "where": fx.ActivityPerturbation(where="p0|p2"),
}
COUNT = int(os.environ.get("FORWAX_PROGRAMS", "5"))


PLANS = {
    "signs": plan_signs,
    "rank 1": plan_low_rank,
    "rank 2": lambda problem: plan_low_rank(problem, 2),
}
some_programs = hypothesis.settings(
    max_examples=COUNT,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=False,
)


@some_programs
@hypothesis.given(RECIPES, hypothesis.strategies.sampled_from(list(RULES)))
def test_no_random_program_is_biased(recipe, rule):
    with jax.enable_x64(True):  # so that rounding can hide nothing
        loss, params, data = build(recipe)
        in_axes = (None, 0, 0, 0) if recipe.mapped else None
        listed = RULES[rule].basis(Signature(loss, 0, False, in_axes).bind((params, *data), {}))
        reference = fx.Exact() if forward_only(recipe) else fx.Backprop()

        def both(params, data):
            return [
                fx.value_and_grad(loss, r, in_axes=in_axes)(KEY, params, *data)
                for r in (listed, reference)
            ]

        (value, grads), (true_value, truth) = jax.jit(both)(params, data)
        assert jnp.isfinite(true_value)
        assert abs(value - true_value) <= 1e-9 * (1 + abs(true_value))
        scale = 1 + jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(truth)))
        off = {
            name: float(jnp.linalg.norm((grads[name] - truth[name]).ravel()) / scale)
            for name in truth
        }
        assert max(off.values()) <= 1e-8, off


@some_programs
@hypothesis.given(RECIPES, hypothesis.strategies.sampled_from(list(PLANS)))
def test_weight_tangents_give_the_slopes_of_their_directions_in_full(recipe, name):
    with jax.enable_x64(True):
        loss, params, data = build(recipe)
        in_axes = (None, 0, 0, 0) if recipe.mapped else None
        problem = Signature(loss, 0, False, in_axes).bind((params, *data), {})
        plan = PLANS[name](problem)

        @jax.jit
        def both(key):
            drawn = plan.draw(key, jnp.arange(2))
            full = dense(plan, drawn)
            slope = lambda v: jax.jvp(lambda p: problem.objective(p)[0], (params,), (v,))
            value, exact = jax.vmap(slope, out_axes=(None, 0))(full)
            sums = jax.tree.map(lambda x: jnp.tensordot(exact, x, axes=1), full)
            got_value, _, slopes = plan.push(drawn, 2)
            new = plan.add(params, slopes, drawn)
            got = (
                got_value,
                slopes,
                plan.assemble(slopes, drawn),
                jax.tree.map(jnp.subtract, new, params),
            )
            return got, (value, exact, sums, sums)

        for got, expected in zip(*map(jax.tree.leaves, both(KEY)), strict=True):
            assert jnp.isfinite(expected).all()
            assert jnp.abs(got - expected).max() <= 1e-8 * (1 + jnp.abs(expected).max())
