"""Law 8: JAX's transformations compose with estimates and do not confuse perturbations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from cases import CASES, RULES, SITE_RULES, assert_trees_close, normal, regression

ALL_RULES = RULES | SITE_RULES

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 3)
PARAMS = {"w": normal(1, 3, 2), "b": normal(2, 2)}
X = normal(3, 4, 3)
MATRIX = normal(5, 4, 4) + normal(5, 4, 4).T


def quadratic_form(w):
    return w @ MATRIX @ w / 2


EAGER_TOO = (
    "dict",
    "real-and-complex",
    "per-example-aux",
    "local-losses",
    "while-loop",
)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in EAGER_TOO],
    ids=lambda case: case.name,
)
def test_jit_changes_nothing(case):
    """Of a rule with a loop over chunks: a scan under a trace and a Python loop outside."""

    def estimate(key):
        return case.estimate(RULES["weight-chunked"], key)

    assert_trees_close(jax.jit(estimate)(KEY), estimate(KEY), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "weight-chunked",
        "weight-projection",
        "low-rank",
        "activity",
        "exact-chunked",
        "finite-differences",
    ],
)
def test_vmap_over_keys_and_parameters(name):
    estimate = fx.value_and_grad(regression, ALL_RULES[name])
    batch = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PARAMS)
    over_both, over_keys, over_params = jax.jit(
        lambda: (
            jax.vmap(estimate, (0, 0, None))(KEYS, batch, X),
            jax.vmap(estimate, (0, None, None))(KEYS, PARAMS, X),
            jax.vmap(estimate, (None, 0, None))(KEY, batch, X),
        )
    )()
    one = jax.jit(estimate)
    loose = (
        {"rtol": 2e-2, "atol": 2e-4}
        if "difference" in name
        else {"rtol": 2e-4, "atol": 1e-5}
    )
    over_both, over_keys, over_params, batch = jax.device_get(
        (over_both, over_keys, over_params, batch)
    )
    for i in range(3):
        at = lambda tree: jax.tree.map(lambda x: x[i], tree)  # noqa: B023
        params = at(batch)
        assert_trees_close(at(over_both), one(KEYS[i], params, X), **loose)
        assert_trees_close(at(over_keys), one(KEYS[i], PARAMS, X), **loose)
        assert_trees_close(at(over_params), one(KEY, params, X), **loose)


LINEAR = {
    "one": fx.WeightPerturbation(),
    "many": fx.WeightPerturbation(fx.tangents.Normal(), 3),
    "chunked": fx.WeightPerturbation(num_tangents=3, chunk_size=2),
    "exact": fx.Exact(chunk_size=2),
    "finite-difference": fx.FiniteDifference(num_tangents=3, epsilon=0.1),
    "backprop": fx.Backprop(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_derivatives_of_an_estimate(name):
    """For w M w/2 the estimate is (V Vᵀ/k) M w, and its Jacobian is known column by column."""

    def estimate(w):
        return fx.grad(quadratic_form, LINEAR[name])(KEY, w)

    w, u = normal(6, 4), normal(7, 4)

    @jax.jit
    def derivatives():
        columns = jax.vmap(estimate)(jnp.eye(4))  # row i is the estimate at e_i
        reverse = jax.grad(lambda w: jnp.vdot(u, estimate(w)))(w)
        forward = jax.jvp(estimate, (w,), (u,))[1]
        again = fx.grad(lambda w: jnp.vdot(u, estimate(w)), fx.Exact())(KEY, w)
        return columns, reverse, forward, again

    columns, reverse, forward, again = derivatives()
    loose = {"rtol": 1e-3, "atol": 1e-3}
    assert_trees_close(reverse, columns @ u, **loose)
    assert_trees_close(again, columns @ u, **loose)
    assert_trees_close(forward, u @ columns, **loose)


@pytest.mark.parametrize("outer", ["one", "exact", "finite-difference", "backprop"])
@pytest.mark.parametrize("inner", ["one", "exact", "finite-difference", "backprop"])
def test_nested_estimates_do_not_confuse_perturbations(outer, inner):
    """d/dx (x · d/dy (x y)) is 2x; confused perturbations would add more.

    All rules are exact with one parameter.
    """

    def loss(x):
        return x * fx.grad(lambda y: x * y, LINEAR[inner])(jax.random.key(1), 2.0)

    value, grads = jax.jit(fx.value_and_grad(loss, LINEAR[outer]))(KEY, 3.0)
    loose = 2e-2 if "difference" in outer + inner else 1e-5
    assert float(value) == pytest.approx(9.0, rel=loose)
    assert float(grads) == pytest.approx(6.0, rel=loose)


def test_a_closed_over_tracer_is_not_differentiated_twice():
    """The classical D(x ↦ x · D(y ↦ x + y)) = 1."""
    got = fx.grad(lambda x: x * fx.grad(lambda y: x + y)(KEY, 1.0))(KEY, 5.0)
    assert float(got) == 1.0


@pytest.mark.parametrize("name", ALL_RULES)
def test_training_inside_scan(name):
    """One compiled loop trains; the same steps one by one give the same parameters."""
    estimate = fx.value_and_grad(regression, ALL_RULES[name])

    def step(params, key):
        value, grads = estimate(key, params, X)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        return params, (value, params)

    keys = jax.random.split(KEY, 40)
    trained, (values, path) = jax.jit(lambda params: lax.scan(step, params, keys))(
        PARAMS
    )
    assert values[-1] < values[0]
    # Of differences the rounding, divided by a small step, differs from program to program.
    if "difference" not in name:
        params, one = PARAMS, jax.jit(step)
        for key in keys[:10]:
            params, _ = one(params, key)
        partial = jax.tree.map(lambda x: np.asarray(x)[9], path)
        assert_trees_close(partial, params, rtol=1e-3, atol=1e-4)
    assert jax.tree.structure(trained) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("name", ["one", "chunked", "exact", "finite-difference"])
def test_inside_checkpoint_and_a_loss_with_checkpoint(name):
    """Both under reverse mode, which runs the estimate a second time."""

    def estimate(w):
        return jnp.sum(fx.grad(quadratic_form, LINEAR[name])(KEY, w) ** 2)

    w = normal(6, 4)
    plain, saved = jax.jit(
        lambda: (jax.grad(estimate)(w), jax.grad(jax.checkpoint(estimate))(w))
    )()
    loose = (
        {"rtol": 2e-2, "atol": 1e-1}
        if "difference" in name
        else {"rtol": 1e-4, "atol": 1e-4}
    )
    assert_trees_close(saved, plain, **loose)


def test_inside_cond_and_while():
    """A step of descent until the loss is small, and none where a flag says so."""
    rule = fx.Exact()

    def loss(w):
        return jnp.sum(w**2)

    def body(w):
        return w - 0.25 * fx.grad(loss, rule)(KEY, w)

    trained = jax.jit(lambda w: lax.while_loop(lambda w: loss(w) > 1e-3, body, w))(
        jnp.ones(3)
    )
    assert loss(trained) < 1e-3
    kept = jax.jit(lambda flag, w: lax.cond(flag, body, lambda w: w, w))(
        False, jnp.ones(3)
    )
    assert kept.tolist() == [1.0, 1.0, 1.0]


def test_in_axes_is_the_mean_over_examples():
    """The estimate of the batch's mean loss, by the same tangents."""

    def batch(params, xs):
        return jnp.mean(jax.vmap(lambda x: regression(params, x[None]))(xs))

    def example(params, x):
        return regression(params, x[None])

    rule = fx.WeightPerturbation(num_tangents=2)
    got = fx.value_and_grad(example, rule, in_axes=(None, 0))(KEY, PARAMS, X)
    assert_trees_close(got, fx.value_and_grad(batch, rule)(KEY, PARAMS, X), rtol=1e-4)


def test_in_axes_of_trees_other_axes_and_keywords():
    def loss(w, batch, *, shift):
        return jnp.vdot(w, batch["x"]) * batch["scale"] + shift

    batch = {"x": normal(1, 3, 5), "scale": normal(2, 2)}
    axes = (None, {"x": 1, "scale": None})
    scaled = {"x": batch["x"], "scale": jnp.asarray(2.0)}
    value, grads = fx.value_and_grad(loss, fx.Exact(), in_axes=axes)(
        KEY, jnp.ones(3), scaled, shift=1.0
    )
    assert float(value) == pytest.approx(float(2 * batch["x"].sum() / 5 + 1), rel=1e-5)
    assert_trees_close(grads, 2 * batch["x"].mean(axis=1))
    whole = fx.grad(
        lambda x, w: jnp.vdot(w, x), fx.Exact(), argnums=1, in_axes=(0, None)
    )(KEY, X, jnp.ones(3))
    assert_trees_close(whole, X.mean(axis=0))


def test_negative_argnums_count_from_the_end():
    def loss(x, w):
        return jnp.vdot(x, w)

    got = fx.grad(loss, fx.Exact(), argnums=-1)(KEY, normal(1, 3), normal(2, 3))
    assert_trees_close(got, normal(1, 3))
    pair = fx.grad(loss, fx.Exact(), argnums=(-1, 0))(KEY, normal(1, 3), normal(2, 3))
    assert_trees_close(pair, (normal(1, 3), normal(2, 3)))
