"""Law 6 for low-rank weight tangents on the models of every library that is installed."""

import importlib

import jax
import numpy as np
import pytest

import forwax as fx
from forwax._directions.plan import plan_low_rank
from forwax._signature import Signature
from sites.drawn import dense
from sites.interop import KEY

LIBRARIES = ("plain_jax", "equinox", "flax_linen", "flax_nnx")


def models():
    """By name, what makes each model; a library that is missing leaves its own out."""
    found = {}
    for library in LIBRARIES:
        try:
            listed = importlib.import_module(f"sites.test_{library}").MODELS
        except pytest.skip.Exception:
            continue
        found |= {f"{library}-{name}": make for name, make in listed.items()}
    return found


MODELS = models()


def assert_close(got, expected):
    """To the rounding of the sums, which is that of the whole tree's size where entries cancel."""
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected)))
    assert size > 0
    for (path, mine), true in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            mine, true, rtol=1e-4, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_the_slope_and_the_estimate_of_the_direction_in_full(name):
    with jax.numpy_rank_promotion("allow"):  # the libraries rely on it
        model = MODELS[name]()
        problem = Signature(model.loss, 0, model.has_aux, model.in_axes).bind(model.args, {})
        plan = plan_low_rank(problem)
        assert any(split is not None for split in plan.splits)

        @jax.jit
        def both(leaves):
            here = plan.at(leaves)
            params, drawn = here.problem.params, fx.tangents.Normal().sample(KEY, here.specs(), 1)
            full = jax.tree.map(lambda v: v[0], dense(here, drawn))
            expected, exact = jax.jvp(lambda p: problem.objective(p)[0], (params,), (full,))
            value, _, slopes = here.push(drawn, 1)
            estimate = jax.tree.map(lambda v: exact * v, full)
            return (value, slopes[0], here.assemble(slopes, drawn)), (expected, exact, estimate)

        (value, slope, grads), (expected, exact, estimate) = both(plan.leaves)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(slope) == pytest.approx(float(exact), rel=1e-4)
    assert_close(grads, estimate)
