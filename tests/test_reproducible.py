"""The same key gives the same estimate.

Whatever its kind, and however the tangents are cut into chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import (
    COMBINATIONS,
    RULES,
    TANGENTS,
    assert_trees_close,
    normal,
    quadratic,
    tree_loss,
)

KEY = jax.random.key(3)
PARAMS = {
    "a": normal(1, 4),
    "z": normal(2, 2, dtype=jnp.complex64),
    "s": jnp.asarray(0.5),
}
MATRIX = normal(4, 2, 3)  # two axes, so that low-rank directions have two sides
NUM_TANGENTS = 5
CHUNKS = (1, 2, 4, 7)


def of_a_product(w):
    """A matrix that data meet in a product, so that low-rank directions stay factors."""
    return quadratic(normal(5, 2, 2) @ w)


def estimate(case, combination, chunk_size):
    rule = fx.WeightPerturbation(
        case.make(MATRIX),
        NUM_TANGENTS,
        COMBINATIONS[combination](MATRIX),
        chunk_size=chunk_size,
    )
    return fx.value_and_grad(of_a_product, rule)(KEY, MATRIX)


@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_chunks_do_not_change_the_estimate(case):
    """Of any combination; k = 5 is no multiple of 2. In one program."""
    sizes = (None, 2)
    whole, chunked = jax.jit(
        lambda: [
            {name: estimate(case, name, size) for name in COMBINATIONS}
            for size in sizes
        ]
    )()
    for name in COMBINATIONS:
        assert_trees_close(chunked[name], whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["signs", "guided"])
def test_every_chunk_size_gives_the_same_estimate(name):
    """Of tangents drawn one by one and of those drawn jointly."""
    case = next(case for case in TANGENTS if case.name == name)
    whole, *chunked = jax.jit(
        lambda: [estimate(case, "mean", size) for size in (None, *CHUNKS)]
    )()
    for output in chunked:
        assert_trees_close(output, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 100])
def test_exact_is_exact_in_every_chunk_size(chunk_size):
    exact = fx.value_and_grad(tree_loss, fx.Exact(chunk_size))
    both = jax.jit(
        lambda params: (exact(KEY, params), jax.value_and_grad(tree_loss)(params))
    )
    assert_trees_close(*both(PARAMS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_finite_differences_take_the_directions_of_weight_perturbation(case):
    """On a quadratic, where central differences are exact to rounding."""

    def both(combination):
        made = case.make(MATRIX), NUM_TANGENTS, COMBINATIONS[combination](MATRIX)
        slopes = fx.grad(of_a_product, fx.WeightPerturbation(*made))(KEY, MATRIX)
        return fx.grad(of_a_product, fx.FiniteDifference(*made, epsilon=0.1))(
            KEY, MATRIX
        ), slopes

    for got, expected in jax.jit(lambda: [both("mean"), both("projection")])():
        assert_trees_close(got, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", RULES)
def test_the_same_key_gives_the_same_estimate_and_another_key_another(name):
    estimate = jax.jit(fx.grad(tree_loss, RULES[name]))
    first, again, other = (
        estimate(KEY, PARAMS),
        estimate(KEY, PARAMS),
        estimate(jax.random.key(4), PARAMS),
    )
    assert_trees_close(again, first, rtol=0, atol=0)
    differs = any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )
    takes_no_key = isinstance(RULES[name], fx.Exact | fx.Backprop)
    assert differs == (not takes_no_key and name != "reverse-by-slopes")


def test_legacy_keys_are_typed_keys():
    typed, legacy = jax.random.key(7), jax.random.PRNGKey(7)
    rule = RULES["weight-chunked"]
    estimate = lambda key: fx.grad(tree_loss, rule)(key, PARAMS)
    assert_trees_close(jax.jit(estimate)(legacy), jax.jit(estimate)(typed), rtol=0)
    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(legacy, 3))
    assert estimates["a"].shape == (3, 4)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators(impl):
    """The same for every chunk size, different from tangent to tangent and from key to key."""
    key = jax.random.key(0, impl=impl)

    def estimate(key, chunk_size=None):
        return fx.grad(
            tree_loss, fx.WeightPerturbation(num_tangents=5, chunk_size=chunk_size)
        )(key, PARAMS)

    first = jax.jit(estimate)(key)
    assert_trees_close(
        jax.jit(lambda key: estimate(key, 2))(key), first, rtol=1e-4, atol=1e-5
    )
    other = jax.jit(estimate)(jax.random.key(1, impl=impl))
    assert not np.allclose(first["a"], other["a"])
    rows = fx.tangents.Rademacher().sample(key, jnp.zeros(64), 5)
    assert len({tuple(row) for row in rows.tolist()}) == 5


def test_a_loss_may_use_a_key_of_its_own():
    """The key before the loss's arguments is the rule's.

    A stochastic loss takes one among its arguments.
    """

    def loss(w, key):
        return jnp.sum((w + jax.random.normal(key, w.shape)) ** 2)

    noise = jax.random.key(1)
    got = fx.grad(loss, fx.Exact())(KEY, jnp.ones(3), noise)
    assert_trees_close(got, jax.grad(loss)(jnp.ones(3), noise))


@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_the_directions_of_a_call_differ_leaf_by_leaf_and_one_by_one(case):
    like = {"first": jnp.zeros(40), "second": jnp.zeros(40)}
    guess = jax.tree.map(lambda x: x + 1, like)
    sample = jax.device_get(
        jax.jit(lambda key: case.make(guess).sample(key, like, 4))(KEY)
    )
    rows = np.concatenate([sample["first"], sample["second"]], axis=1)
    assert not np.array_equal(sample["first"], sample["second"])
    cosines = rows @ rows.T / np.sqrt(np.outer((rows**2).sum(1), (rows**2).sum(1)))
    assert np.abs(cosines - np.eye(4)).max() < 0.6


def test_replacing_a_field_gives_a_new_rule_and_keeps_the_old():
    rule = fx.WeightPerturbation()
    assert dataclasses.replace(rule, num_tangents=3).num_tangents == 3
    assert rule.num_tangents == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.num_tangents = 2


def test_orthogonal_signs_are_so_in_every_aligned_block_of_all_leaves():
    like = [jnp.zeros(3), jnp.zeros((2, 4)), jnp.zeros(5)]
    drawn = fx.tangents.Hadamard().sample(KEY, like, num_tangents=4)
    blocks = jnp.concatenate([x.reshape(4, -1) for x in drawn], axis=1).reshape(4, 4, 4)
    grams = jnp.einsum("jbi,lbi->bjl", blocks, blocks)
    assert grams.tolist() == jnp.broadcast_to(4 * jnp.eye(4), (4, 4, 4)).tolist()


def test_one_orthogonal_sign_vector_is_that_of_independent_signs():
    one, other = (
        tangents.sample(KEY, jnp.zeros(9))
        for tangents in (fx.tangents.Hadamard(), fx.tangents.Rademacher())
    )
    assert one.tolist() == other.tolist()
