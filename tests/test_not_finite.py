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


# --- NaN that only forward mode has ---

RADII = jnp.array([0.5, 1.0, 2.0])


def chords(r):
    """HajimeKawahara/exojax#598, PlasmaControl/DESC#1489, google-deepmind/torax#2331."""
    return jnp.sum(jnp.sqrt(jnp.where(r > RADII, r**2 - RADII**2, 0.0)))


def safe_chords(r):
    hits = r > RADII
    squares = jnp.where(hits, r**2 - RADII**2, 1.0)
    return jnp.sum(jnp.where(hits, jnp.sqrt(squares), 0.0))


@MODES
def test_the_way_out_of_a_masked_root(mode):
    r = jnp.float32(1.5)
    truth = jax.grad(chords)(r)
    assert np.isnan(mode(fx.grad(chords))(KEY, r))
    for loss, rule in (
        (safe_chords, fx.WeightPerturbation()),
        (safe_chords, fx.Backprop()),
        (chords, fx.Exact()),
        (chords, fx.WeightPerturbation(fx.tangents.Coordinate())),
    ):
        np.testing.assert_allclose(mode(fx.grad(loss, rule))(KEY, r), truth, rtol=1e-5)


def test_diagnose_says_where_forward_mode_alone_is_not_finite():
    rules = {"signs": fx.WeightPerturbation(), "exact": fx.Exact()}
    diagnose = lambda loss: fx.diagnose(loss, rules, draws=2, rounds=1)(
        KEY, jnp.float32(1.5)
    )
    found = diagnose(chords)
    signs, exact = found.rules
    assert signs.note is not None
    assert "signs is not finite here, and backprop's gradient is" in signs.note
    assert "jnp.where(ok, jnp.sqrt(y), 0.0)" in signs.note
    assert signs.note in str(found)
    assert "Use signs" not in found.advice
    alone = fx.diagnose(chords, {"signs": rules["signs"]}, draws=2, rounds=1)
    advice = alone(KEY, jnp.float32(1.5)).advice
    assert (
        advice == "Use backprop: reverse mode runs, and no rule gives finite numbers."
    )
    assert exact.note is None
    assert all(row.note is None for row in diagnose(safe_chords).rules)


def test_diagnose_has_no_reference_where_backprop_is_not_finite_either():
    rules = {"signs": fx.WeightPerturbation()}
    found = fx.diagnose(jnp.linalg.norm, rules, draws=2, rounds=1)(KEY, jnp.zeros(3))
    assert found.rules[0].note is None
    assert found.rules[0].mse is None
    assert found.reference is None


def test_safe_skips_what_is_never_finite_and_counts():
    rule = fx.Safe(fx.WeightPerturbation()).init()
    for i in range(3):
        key = jax.random.fold_in(KEY, i)
        _, grads, rule = rule.step(chords)(key, jnp.float32(1.5))
        assert grads == 0
    assert rule.history.num_skipped == 3
