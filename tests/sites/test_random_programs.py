"""Random small programs, none biased: five of fixed seeds, and with `pytest -m slow` 200 new ones.

A failure prints what repeats it: FORWAX_SEED is the first seed, FORWAX_PROGRAMS their number.
"""

import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._directions.plan import plan_low_rank, plan_signs
from forwax._signature import Signature
from helpers import dense, norm
from sites.random_programs import build, forward_only, recipe_of

KEY = jax.random.key(0)
RULES = {
    "keep": fx.ActivityPerturbation(),
    "no exact outputs": fx.ActivityPerturbation(exact_outputs=False),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "where": fx.ActivityPerturbation(where="p0|p2"),
}
PLANS = {
    "signs": plan_signs,
    "rank 1": plan_low_rank,
    "rank 2": lambda problem: plan_low_rank(problem, 2),
}
FIRST = int(os.environ["FORWAX_SEED"])  # conftest.py takes it from the clock
COUNT = int(os.environ.get("FORWAX_PROGRAMS", "200"))
SEEDS = list(range(5))
SEEDS += [pytest.param(FIRST + i, marks=pytest.mark.slow) for i in range(COUNT)]


def said(seed, choices):
    """A recipe and one of the choices, printed with what repeats them."""
    recipe, choice = recipe_of(seed), random.Random(seed).choice(list(choices))
    print(f"{choice}, {recipe}")
    print(
        f"FORWAX_SEED={seed} FORWAX_PROGRAMS=1 pytest -m slow tests/sites/test_random_programs.py"
    )
    return recipe, choice


@pytest.mark.parametrize("seed", SEEDS)
def test_no_random_program_is_biased(seed):
    recipe, rule = said(seed, RULES)
    with jax.enable_x64(True):  # so that rounding can hide nothing
        loss, params, data = build(recipe)
        in_axes = (None, 0, 0, 0) if recipe.mapped else None
        listed = RULES[rule].basis(
            Signature(loss, 0, False, in_axes).bind((params, *data), {})
        )
        reference = fx.Exact() if forward_only(recipe) else fx.Backprop()

        def both(params, data):
            return [
                fx.value_and_grad(loss, r, in_axes=in_axes)(KEY, params, *data)
                for r in (listed, reference)
            ]

        (value, grads), (true_value, truth) = jax.device_get(
            jax.jit(both)(params, data)
        )
        assert np.isfinite(true_value)
        assert abs(value - true_value) <= 1e-9 * (1 + abs(true_value))
        scale = 1 + norm(truth)
        off = {name: norm(grads[name] - truth[name]) / scale for name in truth}
        assert max(off.values()) <= 1e-8, off


@pytest.mark.parametrize("seed", SEEDS)
def test_weight_tangents_give_the_slopes_of_their_directions_in_full(seed):
    recipe, name = said(seed, PLANS)
    with jax.enable_x64(True):
        loss, params, data = build(recipe)
        in_axes = (None, 0, 0, 0) if recipe.mapped else None
        problem = Signature(loss, 0, False, in_axes).bind((params, *data), {})
        plan = PLANS[name](problem)

        @jax.jit
        def both(key):
            drawn = plan.draw(key, jnp.arange(2))
            full = dense(plan, drawn)
            slope = lambda v: jax.jvp(
                lambda p: problem.objective(p)[0], (params,), (v,)
            )
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

        pairs = zip(*map(jax.tree.leaves, jax.device_get(both(KEY))), strict=True)
        for got, expected in pairs:
            assert np.isfinite(expected).all()
            assert np.abs(got - expected).max() <= 1e-8 * (1 + np.abs(expected).max())
