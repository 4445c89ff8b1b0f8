"""Weight noise of each example's own, for losses of which nothing but evaluations is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from cases import assert_trees_close, normal

T = fx.tangents
KEY = jax.random.key(0)
PARAMS = {"a": jnp.ones(4), "b": jnp.ones(2)}
X = normal(0, 8, 4)
AXES = (None, 0)


def converged(params, x):
    """A solver: its parameters go into a loop where nothing tells examples apart."""
    start = jnp.tanh(x * params["a"])[:2] * params["b"]
    grow = lambda s: s * 1.5 + 0.1 * params["b"] ** 2
    return jnp.sum(lax.while_loop(lambda s: jnp.sum(s**2) < 5, grow, start))


def flat(tree):
    """Leaves [draws, ...] side by side."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in leaves], axis=1)


EACH = flat(jax.jit(jax.vmap(jax.jacfwd(converged), AXES))(PARAMS, X))
EXACT = EACH.mean(0)
N = EACH.shape[1]


def errors(rule, draws=3000):
    """Squared errors of estimates, and the estimates."""
    grad = fx.grad(converged, rule, in_axes=AXES)
    found = jax.jit(jax.vmap(lambda key: grad(key, PARAMS, X)))(
        jax.random.split(KEY, draws)
    )
    return np.sum((flat(found) - EXACT) ** 2, axis=1), flat(found)


@pytest.mark.parametrize(
    ("tangents", "k", "chunk_size"),
    [
        (T.Rademacher(), 1, None),
        (T.Rademacher(), 3, 2),
        (T.Normal(), 2, 1),
        (T.Orthonormal(), 3, None),
        (T.Coordinate(replace=False), 3, 2),
        (T.Sphere(), 1, None),
    ],
    ids=str,
)
def test_the_law_is_that_of_the_tangents_for_each_example(tangents, k, chunk_size):
    """M · mean|g_i|²/N, and the same with the mean's own square would be refused."""
    rule = fx.WeightPerturbation(tangents, k, chunk_size=chunk_size, per_example=True)
    square, found = errors(rule)
    one = tangents.relative_mse(N, k)
    law = one * np.mean(np.sum(EACH**2, axis=1)) / len(X)
    assert abs(square.mean() - law) <= 4 * square.std() / len(square) ** 0.5
    shared = one * np.sum(EXACT**2)
    assert abs(square.mean() - shared) > 4 * square.std() / len(square) ** 0.5
    bias = np.sum((found.mean(0) - EXACT) ** 2)
    assert bias < 4 * law / len(square)


def test_it_is_unbiased_by_the_sum_over_its_noise():
    rule = fx.WeightPerturbation(num_tangents=2, per_example=True)
    shown = fx.testing.assert_unbiased(
        rule, converged, [PARAMS, X], in_axes=AXES, tolerance=0.1, power=0.9
    )
    assert shown.basis_sum


@pytest.mark.parametrize("kind", ["default", "rbg"])
def test_examples_have_directions_of_their_own(kind):
    """Equal examples, so that equal directions would give equal errors, and no mean less."""
    impl = None if kind == "default" else "rbg"
    keys = jax.random.split(jax.random.key(1, impl=impl), 200)
    same = jnp.ones((16, 6))
    loss = lambda w, x: jnp.sum(w * x)
    rule = fx.WeightPerturbation(per_example=True)
    grad = jax.jit(fx.grad(loss, rule, in_axes=AXES))
    square = [
        np.sum((np.asarray(grad(key, jnp.ones(6), same)) - 1) ** 2) for key in keys
    ]
    law = 5 * 6 / 16
    assert abs(np.mean(square) - law) <= 5 * np.std(square) / len(keys) ** 0.5


def test_outside_a_trace_inside_one_and_in_chunks_it_is_the_same():
    def estimate(chunk_size):
        rule = fx.WeightPerturbation(
            num_tangents=5, chunk_size=chunk_size, per_example=True
        )
        return fx.value_and_grad(converged, rule, in_axes=AXES)

    expected = estimate(None)(KEY, PARAMS, X)
    for chunk_size in (None, 2, 1):
        assert_trees_close(
            jax.jit(estimate(chunk_size))(KEY, PARAMS, X), expected, rtol=1e-4
        )


def test_dtypes_aux_and_complex_parameters():
    def loss(params, x):
        z = jnp.sum(params["z"] * x[:2].astype(jnp.complex64))
        half = jnp.sum(params["half"].astype(jnp.float32) ** 2)
        return jnp.abs(z) ** 2 + half * x[0], 2 * x

    params = {
        "z": normal(1, 2, dtype=jnp.complex64),
        "half": normal(2, 2, dtype=jnp.bfloat16),
    }
    rule = fx.WeightPerturbation(
        T.Coordinate(replace=False), num_tangents=6, per_example=True
    )
    options = {"in_axes": AXES, "has_aux": True}
    (value, aux), found = fx.value_and_grad(loss, rule, **options)(KEY, params, X)
    (expected_value, expected_aux), expected = fx.value_and_grad(
        loss, fx.Exact(), **options
    )(KEY, params, X)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(aux, expected_aux)
    assert_trees_close(found, expected, rtol=1e-2)


def test_low_rank_directions_of_each_example_are_those_of_the_tangents():
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    w = normal(3, 4, 3)
    rules = (
        fx.WeightPerturbation(T.LowRank(), per_example=True),
        fx.WeightPerturbation(T.LowRank(per_example=True)),
    )
    first, second = (fx.grad(loss, rule, in_axes=AXES)(KEY, w, X) for rule in rules)
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_update_momentum_and_safe_take_it():
    rule = fx.WeightPerturbation(num_tangents=2, per_example=True)

    def both(key):
        value, grads = fx.value_and_grad(converged, rule, in_axes=AXES)(key, PARAMS, X)
        got = fx.update(converged, rule, learning_rate=0.1, in_axes=AXES)(
            key, PARAMS, X
        )
        return got, (value, jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, grads))

    got, expected = jax.jit(both)(KEY)
    assert_trees_close(got, expected, rtol=1e-4)
    momentum = fx.Momentum(window=4).init(KEY, rule, num_examples=8)
    options = {"learning_rate": 0.1, "momentum": momentum, "in_axes": AXES}
    update = jax.jit(fx.update(converged, rule, **options))
    _, moved, momentum = update(KEY, PARAMS, X)
    assert momentum.coefficients.shape == (4, 1, 2, 8)
    assert_trees_close(moved, got[1], rtol=1e-4)
    step = jax.jit(fx.Safe(rule).step(converged, in_axes=AXES))
    _, grads, _ = step(KEY, PARAMS, X)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_bad_input_is_refused_in_words():
    rule = fx.WeightPerturbation(per_example=True)
    name = r"WeightPerturbation\(per_example=True\)"
    with pytest.raises(ValueError, match=name + " needs examples: expected in_axes"):
        fx.grad(converged, rule)(KEY, PARAMS, X[0])
    combined = fx.WeightPerturbation(
        num_tangents=2, combine=fx.combine.Projection(), per_example=True
    )
    with pytest.raises(ValueError, match=name + " gives each example its own slopes"):
        fx.grad(converged, combined, in_axes=AXES)(KEY, PARAMS, X)
    with pytest.raises(ValueError, match="expected a rule whose law follows from n"):
        fx.suggest_learning_rate(rule, 10, 0.1)


def test_explain_names_it_where_in_axes_alone_is_no_help():
    def opaque(params, x):
        step = lambda s: s * (1.5 + params["b"] ** 2)
        return jnp.sum(lax.while_loop(lambda s: jnp.sum(s**2) < 5, step, x[:2]))

    def credit_of(loss, *args, **options):
        return {row.credit for row in fx.explain(loss, **options)(*args).rows}

    way = "see WeightPerturbation(per_example=True)"
    assert credit_of(opaque, PARAMS, X, in_axes=AXES) == {
        f"one slope for all examples: {way}"
    }
    batch = lambda params, x: jnp.mean(jax.vmap(opaque, AXES)(params, x))
    assert credit_of(batch, PARAMS, X) == {
        f"one slope for the batch: {way} with in_axes"
    }
    closed = lambda params: batch(params, X)
    assert credit_of(closed, PARAMS) == {"one slope for the batch"}
    diagnose = fx.diagnose(
        opaque, [fx.ActivityPerturbation()], in_axes=AXES, draws=2, rounds=1
    )
    (note,) = [row.note for row in diagnose(KEY, PARAMS, X).rules]
    assert "at 1 of 1 sites the loss can only be perturbed at a parameter" in note
    assert (
        "forwax.WeightPerturbation(per_example=True) gives each example its own" in note
    )
