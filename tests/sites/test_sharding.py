"""Inside `jax.shard_map` the mean over all noise is what `jax.grad` gives there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import forwax as fx
from forwax._signature import Signature
from sites.programs import normal
from sites.sharded import EACH, PARAMS, loss, sharded


def of_the_batch(p, x):
    return jnp.mean(jnp.sin(jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]))


@pytest.mark.parametrize("check", [True, False])
def test_the_mean_over_all_noise_is_the_gradient_of_all_shards(check):
    problem = Signature(loss, 0, False, EACH).bind((PARAMS, normal(3, 2, 3)), {})
    got, expected = sharded(
        [fx.ActivityPerturbation().basis(problem), fx.Backprop()], check
    )
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        fx.ActivityPerturbation(where="v", num_tangents=4096),
        fx.ActivityPerturbation(memory="shared", num_tangents=4096),
    ],
    ids=["where", "shared"],
)
def test_one_noise_for_all_shards_hears_of_all_their_losses(rule):
    got, expected = sharded([rule, fx.Backprop()])
    error = sum(np.sum((got[n] - expected[n]) ** 2) for n in PARAMS)
    assert error < 0.02 * sum(np.sum(expected[n] ** 2) for n in PARAMS)


def alone_and_together(estimates):
    """Each device's own outputs by a key of its own, and the same computed without a mesh."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    keys, x = jax.random.split(jax.random.key(0), 4), jnp.asarray(normal(3, 8, 3))
    shard = lambda keys, p, x: jax.tree.map(lambda g: g[None], estimates(keys[0], p, x))
    specs = (P("d"), P(), P("d"))
    got = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("d")))(
        keys, PARAMS, x
    )
    expected = jax.jit(jax.vmap(estimates, (0, None, 0)))(
        keys, PARAMS, x.reshape(4, 2, 3)
    )
    return jax.tree.leaves(got), jax.tree.leaves(expected)


ALONE = {
    "weight": fx.WeightPerturbation(),
    "keep": fx.ActivityPerturbation(),
    "where": fx.ActivityPerturbation(where="v", num_tangents=2),
    "shared": fx.ActivityPerturbation(memory="shared"),
}


def test_a_varying_key_gives_each_device_its_own_estimate():
    """That of its own batch by its own key, as if it were alone.

    Under weight and activity noise alike.
    """
    got, expected = alone_and_together(
        lambda *args: {
            name: fx.grad(loss, rule, in_axes=EACH)(*args)
            for name, rule in ALONE.items()
        }
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_varying_key_gives_each_device_its_own_feedback():
    got, expected = alone_and_together(
        lambda *args: fx.FDFA(0.0, num_tangents=2).step(loss, in_axes=EACH)(*args)[:2]
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_credit_along_the_batch_of_a_shard():
    problem = Signature(of_the_batch, 0, False, None).bind(
        (PARAMS, normal(3, 2, 3)), {}
    )
    rule = fx.ActivityPerturbation()
    assert rule.sites(problem).credit
    rules = [rule.basis(problem), fx.Backprop()]
    got, expected = sharded(rules, loss=of_the_batch, in_axes=None)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
