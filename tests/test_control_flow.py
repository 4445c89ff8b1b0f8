"""Law 5: losses that reverse mode rejects train, and so do those that branch on values."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import forwax as fx
from cases import RULES, TRACES, assert_trees_close, eager, normal, while_loss

FORWARD_RULES = [name for name, rule in RULES.items() if not rule.reverse_mode]


def test_reverse_mode_rejects_the_loop():
    with pytest.raises(
        ValueError,
        match=r"Reverse-mode differentiation does not work for lax.while_loop",
    ):
        jax.grad(while_loss)(jnp.ones(3))
    with pytest.raises(
        ValueError,
        match=r"Reverse-mode differentiation does not work for lax.while_loop",
    ):
        fx.grad(while_loss, fx.Backprop())(jax.random.key(0), jnp.ones(3))


def relax(params, data):
    """Iterates h = tanh(w h + x) to convergence and compares the fixed point with a target."""
    w, b = params

    def body(state):
        h, _, trips = state
        new = jnp.tanh(w * h + data + b)
        return new, jnp.max(jnp.abs(new - h)), trips + 1

    start = (jnp.zeros_like(data), jnp.asarray(1.0), 0)
    h, _, trips = lax.while_loop(
        lambda state: (state[1] > 1e-4) & (state[2] < 100), body, start
    )
    return jnp.mean((h - 0.3) ** 2), trips


@pytest.mark.parametrize("name", FORWARD_RULES)
def test_a_loss_with_a_while_loop_trains(name):
    estimate = fx.value_and_grad(relax, RULES[name], has_aux=True)
    data = normal(1, 4) * 0.1

    def step(params, key):
        (value, trips), grads = estimate(key, params, data)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), (value, trips)

    start = (normal(2, 4) * 0.3, jnp.asarray(0.5))
    _, (values, trips) = jax.jit(lambda keys: lax.scan(step, start, keys))(
        jax.random.split(jax.random.key(0), 100)
    )
    assert values[-1] < 0.5 * values[0]
    assert trips[0] > 1


@pytest.mark.parametrize(
    "name", [name for name in FORWARD_RULES if name not in TRACES]
)  # which traces the loss
def test_a_loss_with_python_control_flow_trains(name):
    estimate = fx.value_and_grad(eager, RULES[name])
    params = jnp.array([0.5, 1.0, 1.5])
    value, grads = estimate(jax.random.key(0), params)
    stepped, _ = estimate(
        jax.random.key(1), params - 0.01 * grads / jnp.linalg.norm(grads)
    )
    assert stepped < value


def test_the_exact_gradient_of_python_control_flow_is_that_of_eager_jax():
    params = jnp.array([0.5, 1.0, 1.5])
    for rule in (fx.Exact(), fx.Exact(chunk_size=2)):
        assert_trees_close(
            fx.grad(eager, rule)(jax.random.key(0), params), jax.grad(eager)(params)
        )


def test_python_control_flow_under_jit_gets_jaxs_own_error():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(fx.grad(eager))(jax.random.key(0), jnp.ones(3))


def test_a_dynamic_number_of_trips():
    """`fori_loop` with a traced bound is a while loop."""

    def loss(w, trips):
        return lax.fori_loop(0, trips, lambda i, h: jnp.sin(h) * 1.5, w).sum()

    w = normal(0, 3)
    got = jax.jit(fx.grad(loss, fx.Exact()))(jax.random.key(0), w, 4)
    assert_trees_close(got, jax.grad(lambda w: loss(w, 4))(w))


def test_cond_and_switch():
    def loss(w, branch):
        return lax.switch(
            branch,
            [lambda: jnp.sum(w**2), lambda: jnp.sum(jnp.sin(w)), lambda: jnp.prod(w)],
        )

    w = normal(0, 3)
    both = jax.jit(
        lambda branch: (
            fx.grad(loss, fx.Exact(chunk_size=2))(jax.random.key(0), w, branch),
            jax.grad(loss)(w, branch),
        )
    )
    for branch in range(3):
        assert_trees_close(*both(branch))


@pytest.mark.parametrize("name", [*FORWARD_RULES, "backprop"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_losses_that_are_not_finite_propagate(name, bad):
    """As in JAX: no error, the value and the gradient say so, unless the rule skips it."""

    def loss(w):
        return jnp.sum(w**2) * bad

    value, grads = fx.value_and_grad(loss, RULES[name])(jax.random.key(0), jnp.ones(2))
    expected = jax.value_and_grad(loss)(jnp.ones(2))
    assert not jnp.isfinite(expected[0])
    assert not jnp.isfinite(value)
    assert jnp.isfinite(grads).any() == (name == "safe")


CUSTOM = jax.custom_vjp(lambda x: jnp.sum(x**2))
CUSTOM.defvjp(lambda x: (CUSTOM(x), x), lambda x, cotangent: (2 * x * cotangent,))


@pytest.mark.parametrize(
    "rule",
    [fx.WeightPerturbation(), fx.WeightPerturbation(num_tangents=2), fx.Exact()],
    ids=str,
)
def test_a_custom_vjp_has_no_forward_mode(rule):
    with pytest.raises(
        TypeError,
        match=r"function .*test_control_flow.py:\d+.*custom_jvp; or use .*or forwax.Fini",
    ):
        fx.grad(CUSTOM, rule)(jax.random.key(0), jnp.ones(3))


def test_another_type_error_is_left_alone():
    def loss(x):
        raise TypeError("a custom_vjp of mine")

    with pytest.raises(TypeError, match="a custom_vjp of mine"):
        fx.grad(loss)(jax.random.key(0), jnp.ones(3))


def test_finite_differences_and_backprop_take_a_custom_vjp():
    rule = fx.FiniteDifference(fx.tangents.Coordinate(replace=False), 3, epsilon=0.1)
    expected = jnp.array([2.0, 4.0, 6.0])
    point = jnp.array([1.0, 2.0, 3.0])
    assert_trees_close(
        fx.grad(CUSTOM, rule)(jax.random.key(0), point), expected, rtol=1e-3
    )
    assert_trees_close(
        fx.grad(CUSTOM, fx.Backprop())(jax.random.key(0), point), expected
    )


def test_a_custom_jvp_is_honoured():
    straight_through = jax.custom_jvp(jnp.round)
    straight_through.defjvp(
        lambda primals, tangents: (straight_through(*primals), tangents[0])
    )

    def loss(w):
        return jnp.sum(straight_through(w) * jnp.arange(1.0, 4.0))

    got = fx.grad(loss, fx.Exact())(jax.random.key(0), jnp.ones(3) * 0.4)
    assert got.tolist() == [1.0, 2.0, 3.0]
