"""Random small programs, none biased: `FORWAX_PROGRAMS=300 pytest tests/sites/test_random_programs.py` tries 300."""

import os

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from cases import quick_jit
from forwax._signature import Signature

hypothesis = pytest.importorskip("hypothesis")
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


@hypothesis.settings(
    max_examples=COUNT,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=False,
)
@hypothesis.given(RECIPES, hypothesis.strategies.sampled_from(list(RULES)))
def test_no_random_program_is_biased(recipe, rule):
    with jax.enable_x64(True):  # so that rounding can hide nothing
        loss, params, data = build(recipe)
        in_axes = (None, 0, 0, 0) if recipe.mapped else None
        listed = RULES[rule].basis(Signature(loss, 0, False, in_axes).bind((params, *data), {}))
        reference = fx.Exact() if forward_only(recipe) else fx.Backprop()

        def both(params, data):
            return [fx.value_and_grad(loss, r, in_axes=in_axes)(KEY, params, *data) for r in (listed, reference)]

        (value, grads), (true_value, truth) = quick_jit(both)(params, data)
        assert jnp.isfinite(true_value)
        assert abs(value - true_value) <= 1e-9 * (1 + abs(true_value))
        scale = 1 + jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(truth)))
        off = {name: float(jnp.linalg.norm((grads[name] - truth[name]).ravel()) / scale) for name in truth}
        assert max(off.values()) <= 1e-8, off
