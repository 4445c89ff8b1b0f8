"""Derivatives of estimates: a user's own derivative around a rule goes through all that it uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import normal
from forwax.tangents import Hadamard, LowRank

KEY = jax.random.key(3)
WEIGHTS = {"a": normal(0, 4, 6), "b": normal(1, 6, 3)}
INPUTS = normal(2, 5, 4)
RULES = {
    "weight": fx.WeightPerturbation(),
    "low rank": fx.WeightPerturbation(LowRank(), num_tangents=3, chunk_size=1),
    "hadamard": fx.WeightPerturbation(Hadamard(), num_tangents=2),
    "exact": fx.Exact(),
    "activity": fx.ActivityPerturbation(num_tangents=2),
    "replayed": fx.ActivityPerturbation(memory="replay"),
    "direct feedback": fx.DirectFeedbackAlignment(KEY),
    "backprop": fx.Backprop(),
}


def loss(w, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) ** 2)


@pytest.fixture(autouse=True)
def double():
    """Central differences need the digits."""
    with jax.enable_x64(True):
        yield


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def along(rule, in_axes):
    """A scalar of value and estimate along a line through weights and inputs."""
    w, x = wide(WEIGHTS), wide(INPUTS)

    def of(t):
        moved = jax.tree.map(lambda leaf: leaf + t * jnp.cos(7 * leaf), (w, x))
        value, grads = fx.value_and_grad(loss, rule, in_axes=in_axes)(KEY, *moved)
        leaves = jax.tree.leaves(grads)
        return value + sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

    return jax.jit(of)


@pytest.mark.parametrize("in_axes", [None, (None, 0)])
@pytest.mark.parametrize("name", RULES)
def test_a_derivative_around_an_estimate_is_right(name, in_axes):
    of = along(RULES[name], in_axes)
    step = 1e-5
    expected = (of(step) - of(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(of)(0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(of, (0.0,), (1.0,))[1], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["feedback", "direct", "learned"])
def test_the_value_of_a_feedback_rule_has_its_true_derivative(kind):
    w, x = wide(WEIGHTS), wide(INPUTS)
    rules = {
        "feedback": lambda: fx.FeedbackAlignment(fx.random_feedback(KEY, w)),
        "direct": lambda: fx.DirectFeedbackAlignment(KEY),
        "learned": lambda: fx.LearnedFeedback(correction=True),
    }
    rule = rules[kind]()

    def value(x):
        return fx.value_and_grad(loss, rule, in_axes=(None, 0))(KEY, w, x)[0]

    plain = lambda x: jnp.mean(jax.vmap(lambda row: loss(w, row))(x))
    np.testing.assert_allclose(jax.grad(value)(x), jax.grad(plain)(x), rtol=1e-9)
