"""Traces that are exact, rates that are the best of a sweep, and none where there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import normal

KEY = jax.random.key(0)
CURVATURES = jnp.array([1.0, 2.0, 5.0, 0.5])
W = jnp.array([1.0, -1.0, 0.5, 2.0])


def quadratic(w):
    return jnp.sum(CURVATURES * w**2) / 2


RULES = {
    "signs": fx.WeightPerturbation(),
    "several": fx.WeightPerturbation(fx.tangents.Normal(), 3),
    "differences": fx.FiniteDifference(),
    "backprop": fx.Backprop(),
    "exact": fx.Exact(),
    "safe": fx.Safe(fx.WeightPerturbation()).init(),
}


@pytest.mark.parametrize("name", RULES)
def test_of_a_diagonal_quadratic_the_trace_is_exact(name):
    """And the rate is that of its definition, over many draws."""
    rule = RULES[name]
    found = fx.measure_curvature(quadratic, rule, draws=64)(KEY, W)
    rtol = 1e-2 if name == "differences" else 1e-5
    assert found.trace == pytest.approx(8.5, rel=rtol)
    assert found.trace_error == pytest.approx(0, abs=0.05)
    gradient = np.asarray(CURVATURES * W)
    square = float(gradient @ gradient)
    assert found.gradient_squared == pytest.approx(square, rel=0.5)
    if name in ("backprop", "exact"):
        rate = square / float(gradient @ (np.asarray(CURVATURES) * gradient))
        assert found.learning_rate == pytest.approx(rate, rel=1e-4)
        assert found.decrease == pytest.approx(rate * square / 2, rel=1e-4)
    elif name != "several":
        assert found.learning_rate == pytest.approx(1 / 8.5, rel=rtol)
    assert "learning rate" in str(found)


def test_examples_aux_and_trees():
    params = {"w": normal(1, 3, 2), "b": normal(2, 2)}
    x, y = normal(3, 8, 3), normal(4, 8, 2)
    one = lambda p, x, y: (jnp.sum((x @ p["w"] + p["b"] - y) ** 2), x)
    found = fx.measure_curvature(one, in_axes=(None, 0, 0), has_aux=True, draws=256)(
        KEY, params, x, y
    )
    exact = 2 * 2 * (float(jnp.mean(jnp.sum(x**2, axis=1))) + 1)
    assert abs(found.trace - exact) < 4 * found.trace_error


def network(params, x, y):
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None])
    logits = hidden @ params["second"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))


def test_the_rate_is_near_the_best_of_a_sweep():
    """Of steps along one tangent of signs, as many as show which rates are stable."""
    x = normal(1, 256, 16)
    y = jnp.argmax(x @ normal(2, 16, 4) + 0.5 * normal(3, 256, 4), axis=1)
    start = {
        "first": normal(4, 16, 24) / 4,
        "bias": jnp.zeros(24),
        "second": normal(5, 24, 4) / 5,
    }
    found = fx.measure_curvature(network, draws=64)(KEY, start, x, y)

    @functools.partial(jax.jit, static_argnums=1)
    def final(rate, steps=400):
        def step(params, key):
            _, params = fx.update(network, learning_rate=rate)(key, params, x, y)
            return params, None

        params, _ = jax.lax.scan(step, start, jax.random.split(KEY, steps))
        return network(params, x, y)

    rates = found.learning_rate * 1.5 ** jnp.arange(-4.0, 5.0)
    losses = np.asarray([final(rate) for rate in rates])
    best = rates[np.nanargmin(losses)]
    assert 1 / 1.6 < found.learning_rate / float(best) < 1.6


def test_a_saddle_has_no_rate_and_says_why():
    saddle = lambda w: w[0] ** 2 - w[1] ** 2 + w[2] * w[3]
    found = fx.measure_curvature(saddle)(KEY, W)
    assert found.learning_rate is None
    assert found.decrease is None
    assert "no learning rate: the trace of the Hessian" in str(found)
    assert "not positive beyond its error" in str(found)
    # A trace that is positive, and a gradient along what curves down.
    bent = lambda w: 3 * w[0] ** 2 - w[1] ** 2
    found = fx.measure_curvature(bent, fx.Backprop())(KEY, jnp.array([0.0, 1.0]))
    assert found.trace == pytest.approx(4)
    assert "along the rule's estimates, -4 ± 0, is not positive" in str(found)
    lost = fx.measure_curvature(lambda w: jnp.sum(jnp.log(w)))(KEY, jnp.zeros(3))
    assert str(lost) == "no learning rate: not all slopes and curvatures are finite"
    still = fx.measure_curvature(quadratic)(KEY, jnp.zeros(4))
    assert still.learning_rate is None


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def test_second_differences_where_there_is_no_derivative():
    """Of a custom_vjp function, and of a loss that leaves JAX."""
    found = fx.measure_curvature(lambda w: quadratic(doubled(w)), fx.Backprop())(KEY, W)
    assert found.trace == pytest.approx(34, rel=0.02)
    black_box = lambda w: jnp.float32(np.sum(np.asarray(CURVATURES) * np.square(w)) / 2)
    found = fx.measure_curvature(black_box, fx.FiniteDifference())(KEY, W)
    assert found.learning_rate == pytest.approx(1 / 8.5, rel=0.02)
    branches = lambda w: quadratic(w) if w[0] > 0 else jnp.sum(w)
    found = fx.measure_curvature(branches)(KEY, W)
    assert found.trace == pytest.approx(8.5)


def test_large_parameters_are_moved_far_enough():
    w = 1e5 * W
    found = fx.measure_curvature(
        lambda x: quadratic(x - w) / 100, fx.FiniteDifference(epsilon=1.0)
    )(KEY, w)
    assert found.trace == pytest.approx(0.085, rel=0.05)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        fx.measure_curvature(quadratic, draws=1)
    with pytest.raises(TypeError, match=r"Call it outside of jax.jit"):
        jax.jit(lambda w: fx.measure_curvature(quadratic)(KEY, w).trace)(W)
    with pytest.raises(TypeError, match="expected a rule"):
        fx.measure_curvature(quadratic, 0.1)
    with pytest.raises(ZeroDivisionError):
        fx.measure_curvature(lambda w: 1 / 0)(KEY, W)
