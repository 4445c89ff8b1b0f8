"""Sharing work over devices leaves the law of the variance as it is on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import forwax as fx
from cases import normal
from forwax import _mesh
from forwax._programs import last_sums

W = fx.WeightPerturbation
KEY = jax.random.key(0)
PARAMS = {"a": normal(1, 3, 4), "b": normal(2, 4, 2)}
X = normal(3, 16, 3)
EACH = (None, 0)
DRAWS = 512


def mesh(devices=4):
    return jax.make_mesh(
        (devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )  # fmt: skip


def loss(params, x):
    return jnp.mean((jnp.tanh(jnp.atleast_2d(x) @ params["a"]) @ params["b"]) ** 2)


def averaged(params, x):
    return lax.pmean(loss(params, x), "d")


def with_penalty(params, x):
    """Two terms, one of which all devices have alike, and an aux."""
    penalty = 0.1 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    mean = averaged(params, x)
    return 2 * mean - penalty, mean


def draws(rule, loss, devices=4, check=True, **options):
    """Estimates by `DRAWS` keys, and the value of each."""
    estimate = fx.value_and_grad(loss, rule, **options)

    def shard(keys, params, x):
        return jax.vmap(lambda key: estimate(key, params, x))(keys)

    if devices > 1:
        shard = jax.shard_map(
            shard, mesh=mesh(devices), in_specs=(P(), P(), P("d")), out_specs=P(),
            check_vma=check,
        )  # fmt: skip
    return jax.device_get(jax.jit(shard)(jax.random.split(KEY, DRAWS), PARAMS, X))


def relative_mse(grads, true):
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(true), strict=True))
    error = sum(np.sum((g - t) ** 2) / DRAWS for g, t in pairs)
    return error / sum(np.sum(t**2) for _, t in pairs)


TRUE = jax.device_get(jax.jit(jax.grad(loss))(PARAMS, X))
OWN_SLOPES = {
    "activity": (fx.ActivityPerturbation(), EACH),
    "no-exact-outputs": (fx.ActivityPerturbation(exact_outputs=False), None),
    "weight": (W(per_example=True, num_tangents=2), EACH),
    "low-rank": (W(fx.tangents.LowRank(per_example=True), 2), EACH),
}


@pytest.mark.parametrize("name", OWN_SLOPES)
def test_a_mean_over_devices_in_the_loss_adds_no_noise(name, monkeypatch):
    """Else each slope hears the noise of all devices; the twin does."""
    rule, in_axes = OWN_SLOPES[name]
    _, alone = draws(rule, loss, devices=1, in_axes=in_axes)
    value, together = draws(rule, averaged, in_axes=in_axes)
    np.testing.assert_allclose(value, loss(PARAMS, X), rtol=1e-5)
    law = relative_mse(alone, TRUE)
    assert relative_mse(together, TRUE) == pytest.approx(law, rel=0.1)
    monkeypatch.setattr(
        last_sums, "_linear_in", lambda equations, losses, behind: set()
    )
    _, biased = draws(rule, averaged, in_axes=in_axes)
    assert relative_mse(biased, TRUE) > 1.6 * law


def test_what_all_devices_have_alike_counts_once():
    """Behind the mean too, and aux stays what the loss returned."""
    options = {"has_aux": True, "in_axes": EACH}
    penalized = lambda p, x: with_penalty(p, x)[0]
    (value, aux), grads = draws(fx.ActivityPerturbation(), with_penalty, **options)
    np.testing.assert_allclose(aux.mean(1), loss(PARAMS, X), rtol=1e-5)
    expected = jax.shard_map(
        jax.value_and_grad(penalized), mesh=mesh(), in_specs=(P(), P("d")),
        out_specs=P(),
    )(PARAMS, X)  # fmt: skip
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for name, got in grads.items():
        error = got.std(0, ddof=1) / DRAWS**0.5 + 1e-5
        assert np.all(np.abs(got.mean(0) - expected[1][name]) < 5 * error), name
        assert not np.all(np.abs(got.mean(0) - 1.3 * expected[1][name]) < 5 * error)


def test_a_statistic_of_the_batch_is_no_last_sum():
    """What other devices' noise changes there is a part of the gradient."""

    def normalized(params, x):
        h = jnp.tanh(x @ params["a"])
        h = h / lax.pmean(jnp.mean(h**2), "d")
        return lax.pmean(jnp.mean((h @ params["b"]) ** 2), "d")

    rule = fx.ActivityPerturbation(num_tangents=2)
    _, grads = draws(rule, normalized)
    true = jax.shard_map(
        jax.grad(normalized), mesh=mesh(), in_specs=(P(), P("d")), out_specs=P()
    )(PARAMS, X)
    for name, got in grads.items():
        error = got.std(0, ddof=1) / DRAWS**0.5 + 1e-5
        assert np.all(np.abs(got.mean(0) - np.asarray(true[name])) < 5 * error), name


@pytest.mark.parametrize(
    "rule", [fx.ActivityPerturbation(), W(per_example=True)], ids=["activity", "weight"]
)
def test_where_no_type_says_what_varies_a_warning_does(rule):
    says = r"the sum over \['d'\] at .*test_devices.py:\d+.*averaged.* ends the loss, where"
    with pytest.warns(UserWarning, match=says):
        draws(rule, averaged, check=False, in_axes=EACH)


def test_explain_warns_too():
    table = jax.vmap(
        lambda x: (fx.explain(averaged, in_axes=EACH)(PARAMS, x), x)[1], axis_name="d"
    )
    with pytest.warns(UserWarning, match=r"the sum over \['d'\] at .* ends the loss"):
        table(X.reshape(4, 4, 3))


@pytest.mark.parametrize("name", ["weight", "low-rank"])
def test_examples_of_different_devices_have_directions_of_their_own(name, monkeypatch):
    """With equal examples on all of them shared directions would show most; the twin's are."""
    rule, _ = OWN_SLOPES[name]
    same = jnp.tile(X[:1], (16, 1))
    monkeypatch.setitem(globals(), "X", same)
    true = jax.device_get(jax.grad(loss)(PARAMS, same))
    _, alone = draws(rule, loss, devices=1, in_axes=EACH)
    law = relative_mse(alone, true)
    _, together = draws(rule, averaged, in_axes=EACH)
    assert relative_mse(together, true) == pytest.approx(law, rel=0.1)
    monkeypatch.setattr("forwax._mesh.own_key", lambda key, over: _mesh.vary(key, over))
    _, shared = draws(rule, averaged, in_axes=EACH)
    assert relative_mse(shared, true) > 1.6 * law


def test_safe_rules_guard_the_slopes_of_all_devices_examples():
    rule = fx.Safe(W(fx.tangents.LowRank(per_example=True)), clip=2.0).init()

    def shard(params, x):
        *_, safe = rule.step(averaged, in_axes=EACH)(KEY, params, x)
        return safe.history

    step = jax.shard_map(shard, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P())
    assert int(jax.jit(step)(PARAMS, X).num_steps) == 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_samples_of_low_rank_are_the_rules_own_for_plain_matrices(rank):
    """The slope of a loss that is linear in its matrices says along what it was taken."""
    tangents = fx.tangents.LowRank(rank)
    params = {"w": normal(1, 3, 4), "b": normal(2, 4)}

    def linear(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"] + params["b"][None]))

    slope = lambda v: jax.jvp(lambda p: linear(p, X), (params,), (v,))[1]
    grads = jax.jit(fx.grad(linear, W(tangents)))(KEY, params, X)
    v = jax.tree.map(lambda x: x[0], tangents.sample(KEY, params))
    for name, leaf in grads.items():
        np.testing.assert_allclose(leaf, slope(v) * v[name], rtol=1e-4, atol=1e-4)
