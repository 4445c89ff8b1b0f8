"""Scales of activity noise: their law, what calibration finds, how they are given, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import forwax as fx
from forwax._signature import Signature
from forwax._sites.balance import balanced
from helpers import estimates, problem_of
from sites.programs import PROGRAMS, normal
from sites.sharded import EACH, PARAMS, loss, sharded

KEY = jax.random.key(0)
N, P, Q, R = 4, 3, 4, 5
NET = {
    "a": normal(0, P, Q),
    "b": 0.1 * normal(1, Q, R),
    "c": 5 * normal(2, R, 2),
    "d": normal(3, 2),
}
X = normal(4, N, P)


def net(p, x):
    """Three sites with noise, of unlike errors and inputs, and an exact one."""
    h = jnp.tanh(x @ p["a"])
    h = jnp.tanh(3 * (h @ p["b"]))
    return jnp.sum(jnp.sin(jnp.tanh(h @ p["c"]) @ p["d"]))


def parts():
    """By backprop, for each example: errors δ and local Jacobians' squares |J|² of each site."""

    def tapped(z, x):
        first = x @ NET["a"] + z[0]
        second = jnp.tanh(first) @ NET["b"] + z[1]
        third = jnp.tanh(3 * second) @ NET["c"] + z[2]
        inputs = (x, jnp.tanh(first), jnp.tanh(3 * second))
        return jnp.sum(jnp.sin(jnp.tanh(third) @ NET["d"])), inputs

    zeros = [jnp.zeros(Q), jnp.zeros(R), jnp.zeros(2)]
    each = jax.vmap(jax.grad(tapped, has_aux=True), (None, 0))
    deltas, inputs = jax.jit(each)(zeros, X)
    lengths = [np.sum(np.square(h), 1) for h in inputs]  # of each coordinate's Jacobian
    return [np.asarray(d) / N for d in deltas], lengths


def law(scales):
    """E|ĝ - g|² of signs: Σ over examples of |a|²|M|² + |Mᵀa|² - 2 Σ a_j²|M_j|².

    Here a = σδ, M = J/σ, and |M_j|² is |h|²/σ² for each coordinate of a site.
    """
    deltas, lengths = parts()
    total = 0
    for i in range(N):
        a = [s * d[i] for s, d in zip(scales, deltas, strict=True)]
        m = [h[i] / s**2 for s, h in zip(scales, lengths, strict=True)]
        errors = sum(np.sum(x**2) for x in a)
        jacobians = sum(x.size * y for x, y in zip(a, m, strict=True))
        same = sum(np.sum(x**2) * y for x, y in zip(a, m, strict=True))
        total += (
            errors * jacobians - same
        )  # |Mᵀa|² is Σ a_j²|M_j|² here: rows share inputs
    return total


def measured(scales, draws=20_000):
    rule = fx.ActivityPerturbation(scales=scales)
    grad = fx.grad(net, rule, in_axes=(None, 0))
    truth = fx.grad(net, fx.Backprop(), in_axes=(None, 0))(KEY, NET, X)

    @jax.jit
    def errors(keys):
        def one(key):
            got = grad(key, NET, X)
            return sum(jnp.sum((got[n] - truth[n]) ** 2) for n in truth)

        return jax.lax.map(one, keys, batch_size=500)

    found = np.asarray(errors(jax.random.split(KEY, draws)))
    return found.mean(), found.std() / draws**0.5


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.3, 2.0, 1.0)])
def test_the_squared_error_is_its_law(scales):
    """Five standard errors; they are below 2 %, and the two laws differ by more than tenfold."""
    mean, error = measured(scales)
    assert error < 0.02 * mean
    assert abs(mean - law(scales)) < 5 * error


def test_calibration_finds_the_formula_and_lowers_the_error():
    """|J|/|δ| within 20 %, and an error near the least that any scales of this form have."""
    deltas, lengths = parts()
    jacobian = [
        (h.sum() * d.shape[1]) ** 0.5 for h, d in zip(lengths, deltas, strict=True)
    ]
    delta = [np.sqrt(np.sum(d**2)) for d in deltas]
    formula = np.sqrt(np.array(jacobian) / np.array(delta))
    formula /= np.exp(np.mean(np.log(formula)))
    calibrate = fx.ActivityPerturbation().calibrate(net, in_axes=(None, 0), draws=256)
    rule = jax.jit(calibrate)(KEY, NET, X)
    np.testing.assert_allclose(rule.scales, formula, rtol=0.2)
    assert law(np.asarray(rule.scales)) < 0.6 * law((1, 1, 1))
    again = rule.calibrate(net, in_axes=(None, 0), draws=256)
    next_rule = jax.jit(again)(jax.random.key(1), NET, X)
    assert law(np.asarray(next_rule.scales)) < 1.05 * law(np.asarray(rule.scales))


def test_a_twin_that_forgets_to_divide_is_found():
    """The basis' exact mean: noise of scale 2 without the division gives twice the gradient."""

    @dataclasses.dataclass(frozen=True)
    class Undivided(fx.ActivityPerturbation):
        def _slopes(self, sites, scales, *more):
            return super()._slopes(sites, {}, *more)

    problem = dataclasses.replace(PROGRAMS["tied"], loss=net, params=NET, data=(X,))
    rules = [
        cls(scales=(1.0, 2.0, 1.0)) for cls in (fx.ActivityPerturbation, Undivided)
    ]
    listed = [rule.basis(problem_of(problem)) for rule in rules]
    (_, right), (_, wrong), (_, truth) = estimates(problem, *listed, fx.Backprop())
    np.testing.assert_allclose(right["b"], truth["b"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(wrong["b"], 4 * truth["b"], rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        fx.testing.assert_unbiased(rules[1], net, (NET, X), in_axes=(None, 0))
    fx.testing.assert_unbiased(rules[0], net, (NET, X), in_axes=(None, 0))


def test_one_step_balances_a_matrix_of_rank_one_and_passes_over_what_is_zero():
    scales = balanced(
        jnp.ones(4), jnp.array([4.0, 1, 0, jnp.nan]), jnp.array([1.0, 4, 3, 1])
    )
    np.testing.assert_allclose(scales, [2**0.5, 0.5**0.5, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("memory", ["keep", "replay", "shared"])
def test_equal_scales_change_nothing(memory):
    plain = fx.ActivityPerturbation(memory=memory, num_tangents=2)
    equal = dataclasses.replace(plain, scales=(2.0, 2.0))
    program = PROGRAMS["embedding"]
    count = len(plain.sites(problem_of(program)).noisy)
    equal = dataclasses.replace(plain, scales=jnp.full(count, 2.0))
    (_, got), (_, expected) = estimates(program, equal, plain)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-6)


def causal(p, x):
    """A gain with fewer entries than activities, and later terms that its noise changes."""
    h = jnp.cumsum(
        jnp.tanh(x * p["gain"][None]) @ p["w"], axis=0
    )  # [positions, features]
    return jnp.sum(jnp.sin(jnp.tanh(h @ p["v"]) @ p["o"]))


@pytest.mark.parametrize("noise", ["activity", "auto"])
@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_scales_change_no_mean_where_later_terms_decay(memory, noise):
    """The decayed mean, which is not the gradient, is that of equal scales; calibrated ones too."""
    params = {"gain": normal(5, P), "w": normal(6, P, Q), "v": normal(7, Q, R)}
    params["o"] = normal(8, R)
    x = normal(9, 2, 3, P)
    program = dataclasses.replace(
        PROGRAMS["tied"], loss=causal, params=params, data=(x,)
    )
    rule = fx.ActivityPerturbation(
        memory=memory, noise=noise, credit=fx.credit.Decay(0.5)
    )
    rows = fx.explain(causal, rule, in_axes=(None, 0))(params, x).rows
    assert any(row.credit.endswith("later terms decaying") for row in rows)
    own = "weight noise of each example" in {row.operation for row in rows}
    assert own == (noise == "auto")
    calibrated = rule.calibrate(causal, in_axes=(None, 0))(KEY, params, jnp.asarray(x))
    assert calibrated.credit is rule.credit
    assert np.ptp(calibrated.scales) > 0.1
    basis = rule.basis(problem_of(program))
    scaled = dataclasses.replace(basis, scales=calibrated.scales)
    plain = dataclasses.replace(basis, scales=np.ones(len(rows) - 1))
    (_, got), (_, expected), (_, truth) = estimates(
        program, scaled, plain, fx.Backprop()
    )
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got["w"], truth["w"], rtol=0.05)


def test_scales_are_leaves_and_may_be_mapped():
    rule = fx.ActivityPerturbation(scales=jnp.ones(3))
    assert len(jax.tree.leaves(rule)) == 1
    grad = lambda rule: fx.grad(net, rule, in_axes=(None, 0))(KEY, NET, X)["b"]
    scales = jnp.array([[1.0, 1, 1], [1, 2, 3]])
    both = jax.jit(jax.vmap(lambda s: grad(fx.ActivityPerturbation(scales=s))))(scales)
    for got, own in zip(both, scales, strict=True):
        np.testing.assert_allclose(
            got, grad(fx.ActivityPerturbation(scales=own)), 1e-4, 1e-6
        )
    as_tuple = fx.ActivityPerturbation(scales=tuple(map(float, scales[1])))
    np.testing.assert_allclose(both[1], jax.jit(grad)(as_tuple), 1e-4, 1e-6)


@pytest.mark.parametrize("memory", ["keep", "replay"])
def test_scales_are_rounded_once_in_bfloat16(memory):
    """Signs of scale 1/3: squares of the rounded scale divide by themselves."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), NET)
    x = jnp.asarray(X, jnp.bfloat16)
    rule = fx.ActivityPerturbation(memory=memory)
    grads = [
        jax.jit(fx.grad(net, dataclasses.replace(rule, scales=s), in_axes=(None, 0)))(
            KEY, params, x
        )
        for s in ((1.0, 1.0, 1.0), (1 / 3, 1 / 3, 1 / 3))
    ]
    one, third = (np.asarray(g["b"], np.float32) for g in grads)
    np.testing.assert_allclose(third, one, rtol=0.03, atol=0.02 * np.abs(one).max())


def test_scales_inside_shard_map():
    """Each device's estimate from its own noise; the mean over all noise is the gradient."""
    problem = Signature(loss, 0, False, EACH).bind((PARAMS, normal(3, 2, 3)), {})
    rule = fx.ActivityPerturbation(scales=(3.0,))
    got, expected = sharded([rule.basis(problem), fx.Backprop()])
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scales", "text"),
    [
        (
            (1.0, 2.0),
            "one scale for each of the 3 sites with noise, .* of shape \\(2,\\)",
        ),
        (2.0, "Pass an array of shape \\(3,\\), or let rule.calibrate find"),
        ((1.0, 0.0, 2.0), "positive, finite scales, got \\[1.0, 0.0, 2.0\\]"),
        ((1.0, -1.0, 2.0), "positive, finite scales"),
        ((1.0, np.nan, 2.0), "positive, finite scales"),
    ],
)
def test_bad_scales_are_named(scales, text):
    rule = fx.ActivityPerturbation(scales=scales)
    with pytest.raises(ValueError, match=text):
        fx.grad(net, rule, in_axes=(None, 0))(KEY, NET, X)


def test_bad_calls_of_calibrate():
    with pytest.raises(ValueError, match="draws to be a positive integer, got 0"):
        fx.ActivityPerturbation().calibrate(net, draws=0)
    with pytest.raises(TypeError, match="must be a PRNG key"):
        fx.ActivityPerturbation().calibrate(net, in_axes=(None, 0))(NET, X)


def test_there_is_no_law_of_n_alone_with_scales():
    rule = fx.ActivityPerturbation(scales=(1.0, 2.0))
    assert np.isnan(rule.relative_mse(10))
    with pytest.raises(ValueError, match="law follows from n alone"):
        fx.suggest_learning_rate(rule, 10, 0.1)


def test_calibration_inside_shard_map_is_that_of_all_shards():
    """All devices get one set of scales, within 20 % of those found on one device."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    calibrate = fx.ActivityPerturbation().calibrate(net, in_axes=(None, 0), draws=64)
    scales = lambda key, p, x: calibrate(key, p, x).scales
    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec("d"))
    step = jax.shard_map(scales, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    got = jax.jit(step)(KEY, NET, X)
    np.testing.assert_allclose(got, scales(KEY, NET, jnp.asarray(X)), rtol=0.2)


@pytest.mark.parametrize("memory", ["replay", "shared"])
def test_each_memory_calibrates_to_its_own_slopes(memory):
    rule = fx.ActivityPerturbation(memory=memory)
    scales = rule.calibrate(net, in_axes=(None, 0), draws=64)(KEY, NET, X).scales
    kept = fx.ActivityPerturbation().calibrate(net, in_axes=(None, 0), draws=64)
    np.testing.assert_allclose(scales, kept(KEY, NET, X).scales, rtol=0.3)


def test_a_loss_without_noise_has_no_scales():
    loss = lambda w, x: jnp.sum(jnp.sin(x @ w))
    calibrate = fx.ActivityPerturbation().calibrate(loss, in_axes=(None, 0))
    rule = calibrate(KEY, jnp.ones((P, 2)), X)
    assert rule.scales.shape == (0,)
    fx.grad(loss, rule, in_axes=(None, 0))(KEY, jnp.ones((P, 2)), X)
