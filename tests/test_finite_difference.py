"""The step of finite differences: never lost to rounding, never refused where it is traced."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import assert_trees_close

KEY = jax.random.key(0)
SLOPES = jnp.array([1.0, -2.0, 3.0, 0.5])
LARGE = {"bfloat16": 100.0, "float16": 300.0, "float32": 1e5}
"""Around them the default step of an ordinary parameter moves nothing."""

ALL = fx.tangents.Coordinate(replace=False)


@pytest.mark.parametrize("epsilon", [-1e-3, 0, 0.0, math.nan, math.inf, np.float32(-1)])
def test_steps_that_are_none_are_refused(epsilon):
    with pytest.raises(
        ValueError, match=r"epsilon, .* positive and finite, got .* signs"
    ):
        fx.FiniteDifference(epsilon=epsilon)


@pytest.mark.parametrize(
    ("dtype", "small", "proposed"),
    [("bfloat16", 1e-3, 0.16), ("float16", 5e-4, 0.079), ("float32", 1e-8, 0.0039)],
)
def test_what_is_proposed_serves(dtype, small, proposed):
    """Near the cube root of the rounding unit, where both errors are alike."""
    loss = lambda w: jnp.sum(jnp.exp(w.astype(jnp.float32)))
    w = jnp.linspace(-1, 1, 5).astype(dtype)
    with pytest.raises(
        ValueError, match=rf"epsilon .* Pass epsilon={proposed}, leave it"
    ):
        fx.grad(loss, fx.FiniteDifference(epsilon=small))(KEY, w)
    rule = fx.FiniteDifference(ALL, 5, epsilon=proposed)
    grads = fx.grad(loss, rule)(KEY, w)
    assert_trees_close(grads, jax.grad(loss)(w), rtol=0.05)


STEPS = {"default": None, "array": jnp.float32(1e-9)}


@pytest.mark.parametrize("mode", ["eager", "jitted"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", LARGE)
def test_no_estimate_is_lost_to_rounding(dtype, step, mode):
    """Of parameters that are large, or large and small; the slopes to a few per cent."""
    for sizes in (np.ones(4), np.array([1, 0.1, 1e-5, 0])):
        w = (LARGE[dtype] * jnp.asarray(sizes)).astype(dtype)
        start = w.astype(jnp.float32)

        def loss(w, start=start):
            return jnp.sum(SLOPES * (w.astype(jnp.float32) - start))

        for tangents, combine in (
            (ALL, fx.combine.Mean()),
            (fx.tangents.Hadamard(), fx.combine.ControlVariate(SLOPES)),
        ):
            rule = fx.FiniteDifference(tangents, 4, combine, STEPS[step])
            estimate = fx.grad(loss, rule)
            grads = (jax.jit(estimate) if mode == "jitted" else estimate)(KEY, w)
            wide = grads.astype(jnp.float32)
            assert_trees_close(wide, SLOPES, rtol=0.04)


@pytest.mark.parametrize("dtype", LARGE)
def test_factors_of_whole_leaves_move_every_parameter(dtype):
    """A matrix of ordinary entries, and one that is far larger."""
    w = jnp.ones((8, 8)).at[2, 3].set(LARGE[dtype]).astype(dtype)
    loss = lambda w: (w[2, 3].astype(jnp.float32) - LARGE[dtype]) * 3
    rule = fx.FiniteDifference(fx.tangents.LowRank())
    for key in jax.random.split(KEY, 3):
        grads = jax.jit(fx.grad(loss, rule))(key, w).astype(jnp.float32)
        assert_trees_close(jnp.abs(grads), jnp.full((8, 8), 3.0), rtol=0.01)


def test_ordinary_parameters_have_no_factors():
    rule = fx.FiniteDifference(epsilon=1e-3)
    w = jnp.array([1.0, -3.0, 500.0])
    v = rule.tangents.sample(KEY, w)[0]
    loss = lambda w: jnp.sum(jnp.sin(w))
    slope = (loss(w + 1e-3 * v) - loss(w - 1e-3 * v)) / 2e-3
    assert_trees_close(fx.grad(loss, rule)(KEY, w), slope * v, rtol=1e-4)


def test_the_law_with_factors():
    """(Σ g² s²)(Σ 1/s²) / |g|² - 1 with signs, and the mean is the gradient all the same."""
    n, epsilon = 40, 2.0**-6
    w = jnp.repeat(jnp.array([1.0, 2e4, 4e4, 1e5]), n // 4)
    slopes = jnp.sin(jnp.arange(1.0, n + 1))
    # 8 spacings or a little more, in whole spacings, over ε; the first leaf's are far below.
    factors = jnp.repeat(jnp.array([1, 10 / 8, 10 / 4, 12 / 2]), n // 4)
    rule = fx.FiniteDifference(epsilon=epsilon)
    estimate = fx.grad(lambda x: jnp.sum(slopes * (x - w)), rule)
    grads = jax.jit(jax.vmap(estimate, (0, None)))(jax.random.split(KEY, 8192), w)
    errors = jnp.sum((grads - slopes[None]) ** 2, axis=1) / jnp.sum(slopes**2)
    law = jnp.sum((slopes * factors) ** 2) * jnp.sum(factors**-2) / jnp.sum(slopes**2)
    spread = jnp.std(errors) / math.sqrt(len(grads))
    assert abs(float(jnp.mean(errors) - (law - 1))) < 4 * spread
    assert abs(float(jnp.mean(errors) - (n - 1))) > 40 * spread
    bias = jnp.abs(jnp.mean(grads, axis=0) - slopes)
    assert bool(jnp.all(bias < 5 * jnp.std(grads, axis=0) / math.sqrt(len(grads))))


# --- memory ---


def chain(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        (fx.FiniteDifference(), 1.1),
        (fx.FiniteDifference(fx.tangents.LowRank(), 3), 2.1),
        (fx.FiniteDifference(fx.tangents.Normal(), 4), 2.6),
    ],
    ids=["signs", "factors", "normals"],
)
def test_steps_are_not_held(rule, most):
    """The shifted parameters and, where they are held, the directions; as for fixed steps."""
    params = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 8
    x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    step = jax.jit(fx.value_and_grad(chain, rule))
    held = step.lower(KEY, params, x).compile().memory_analysis().temp_size_in_bytes
    assert held < most * 8 * 256 * 256 * 4
