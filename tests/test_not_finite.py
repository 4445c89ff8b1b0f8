"""A derivative that is infinite or not a number stays in the coordinates that it belongs to.

IvanYashchuk/jax-fenics-adjoint#2, jax-ml/jax#3058: 0 · ∞ made all of an exact gradient NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx

KEY = jax.random.key(0)
MODES = pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])


def roots(p):
    return jnp.sqrt(p["a"]) + 3 * p["b"] ** 2 + jnp.sum(jnp.sqrt(p["c"]))


def by_position(p):
    return jnp.sqrt(p[0]) + 3 * p[1] ** 2 + p[2] ** 0.5 + jnp.log1p(p[3])


def over_time(p):
    """A recurrence whose every step has a steep operation."""
    step = lambda s, x: (s + jnp.sqrt(x) + p["b"], jnp.sqrt(p["a"]) * x)
    last, each = lax.scan(step, jnp.zeros(()), p["c"])
    return last + jnp.sum(each)


PARAMS = {
    "a": jnp.float32(0.0),
    "b": jnp.float32(1.0),
    "c": jnp.array([4.0, 0.0, 1.0]),
}
POSITIONS = jnp.array([0.0, 1.0, 0.0, 2.0])
PROBLEMS = pytest.mark.parametrize(
    ("loss", "params"),
    [(roots, PARAMS), (by_position, POSITIONS), (over_time, PARAMS)],
    ids=["tree", "array", "scan"],
)


def assert_same(got, want):
    """Infinities and NaN in the same places, and the same numbers elsewhere."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@MODES
@PROBLEMS
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_exact_is_what_jax_says(mode, loss, params, chunk_size):
    got = mode(fx.grad(loss, fx.Exact(chunk_size)))(KEY, params)
    want = jax.grad(loss)(params)
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(want))
    assert_same(got, want)


@PROBLEMS
def test_exact_under_vmap(loss, params):
    params = jax.tree.map(lambda x: jnp.stack([x, x + 1]), params)
    got = jax.vmap(fx.grad(loss, fx.Exact()), (None, 0))(KEY, params)
    assert_same(got, jax.vmap(jax.grad(loss))(params))


@MODES
@PROBLEMS
@pytest.mark.parametrize("rule", [fx.WeightPerturbation, fx.FiniteDifference])
@pytest.mark.parametrize(
    "combination",
    [fx.combine.Mean(), fx.combine.Projection()],
    ids=lambda c: type(c).__name__,
)
def test_coordinates(mode, loss, params, rule, combination):
    n = sum(x.size for x in jax.tree.leaves(params))
    rule = rule(fx.tangents.Coordinate(replace=False), n, combination)
    got = mode(fx.grad(loss, rule))(KEY, params)
    want = jax.grad(loss)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.atleast_1d(a), np.atleast_1d(b)
        bad = ~np.isfinite(b)
        assert (~np.isfinite(a) == bad).all()
        np.testing.assert_allclose(a[~bad], b[~bad], rtol=2e-2)  # of differences


@pytest.mark.parametrize("chunk_size", [None, 3])
@MODES
def test_a_bad_slope_stays_with_the_entries_of_its_direction(mode, chunk_size):
    """Σ c v with infinite and NaN c: what no bad direction moves is as without it."""
    n, k = 40, 8
    tangents = fx.tangents.Sparse(0.1)
    params = jnp.linspace(1.0, 2.0, n).at[:2].set(0.0)
    loss = lambda p: jnp.sqrt(p[0]) + jnp.sum(p[2:] ** 2)
    tame = lambda p: jnp.sum(p[2:] ** 2)
    drawn = tangents.sample(KEY, params, k)
    spoilt = np.asarray((drawn != 0)[np.asarray(drawn[:, 0] != 0)].any(axis=0))
    assert 0 < spoilt.sum() < n
    rule = fx.WeightPerturbation(tangents, k, chunk_size=chunk_size)
    got = np.asarray(mode(fx.grad(loss, rule))(KEY, params))
    want = np.asarray(fx.grad(tame, rule)(KEY, params))
    assert (~np.isfinite(got) == spoilt).all()
    np.testing.assert_allclose(got[~spoilt], want[~spoilt], rtol=1e-5)


@MODES
def test_update_along_sparse_directions(mode):
    rule = fx.WeightPerturbation(fx.tangents.Sparse(0.1), 2)
    params = jnp.linspace(1.0, 2.0, 40).at[0].set(0.0)
    loss = lambda p: jnp.sum(p**0.5)
    grads = fx.grad(loss, rule)(KEY, params)
    _, got = mode(fx.update(loss, rule, learning_rate=0.1))(KEY, params)
    np.testing.assert_allclose(got, params - 0.1 * grads, rtol=1e-5)


def test_a_projection_is_spoilt_where_directions_mix_and_nowhere_else():
    combination = fx.combine.Projection()
    tangents = jnp.array([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3]])
    slopes = jnp.array([1.0, jnp.nan, 2.0, 3.0])
    got = np.asarray(combination.coefficients(slopes, tangents))
    assert np.isnan(got).tolist() == [True, True, False, False]
    np.testing.assert_allclose(got[2:], [0.5, 1 / 3], rtol=1e-5)
    infinite = combination.coefficients(slopes.at[1].set(jnp.inf), tangents)
    assert np.isinf(np.asarray(infinite)).tolist() == [True, True, False, False]


def test_a_loss_that_branches_on_values_keeps_jaxs_own_tangents():
    def branching(p):
        return jnp.sqrt(p["a"]) + p["b"] if p["b"] > 0 else p["a"]

    grads = fx.grad(branching, fx.Exact())(KEY, {k: PARAMS[k] for k in "ab"})
    assert np.isinf(grads["a"])
    assert np.isnan(grads["b"])


def test_complex_parameters():
    z = jnp.array([0j, 1 + 2j], jnp.complex64)
    loss = lambda z: jnp.sqrt(jnp.abs(z[0])) + jnp.abs(z[1]) ** 2
    got = jax.jit(fx.grad(loss, fx.Exact()))(KEY, z)
    np.testing.assert_allclose(got[1], jax.grad(loss)(z)[1], rtol=1e-5)
