"""`memory="replay"`.

The estimate of `keep` for the same noise, from temporaries that do not grow with depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._sites.sources import with_slopes_of_loops
from helpers import Given, estimates, noise_of, problem_of
from sites.programs import PROGRAMS
from sites.sharded import PARAMS, sharded

KEY = jax.random.key(3)
SOME = ["local_losses", "nested_scans", "parameters_in_carries"]


class Coarse(fx.ActivityPerturbation):
    """All steps of a loop with one slope, as `replay` needs it."""

    def sites(self, problem):
        return with_slopes_of_loops(super().sites(problem))


def kept(rule, program, key):
    """The estimate from recorded inputs, with the noise that `replay` draws."""
    noise = jax.jit(lambda key: noise_of(rule, rule.sites(problem_of(program)), key))(
        key
    )
    keep = Coarse(tangents=Given(noise), num_tangents=rule.num_tangents)
    return estimates(program, keep)


def assert_equal(got, expected):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=1e-5 * float(np.max(np.abs(y)))
        )


@pytest.mark.parametrize("name", SOME)
def test_it_is_the_estimate_of_keep_for_the_same_noise(name):
    program = PROGRAMS[name]
    rule = fx.ActivityPerturbation(
        tangents=fx.tangents.Normal(), num_tangents=2, memory="replay"
    )
    assert_equal(estimates(program, rule, key=KEY), kept(rule, program, KEY))


@pytest.mark.parametrize("name", ["batch_loss", "complex_activities"])
def test_signs_without_examples_and_of_complex_values(name):
    program = PROGRAMS[name]
    rule = fx.ActivityPerturbation(memory="replay")
    assert_equal(estimates(program, rule, key=KEY), kept(rule, program, KEY))


@pytest.mark.parametrize(
    ("name", "tangents"),
    [
        ("nested_scans", fx.tangents.Orthonormal()),
        ("parameters_in_carries", fx.tangents.Orthonormal()),
        ("tied", fx.tangents.Hadamard()),
    ],
)
def test_noise_that_is_held_is_that_of_keep(name, tangents):
    keep = Coarse(tangents=tangents, num_tangents=2)
    replay = fx.ActivityPerturbation(tangents=tangents, num_tangents=2, memory="replay")
    assert_equal(*estimates(PROGRAMS[name], keep, replay, key=KEY))


def test_noise_from_a_generator_that_cannot_be_mapped():
    """Under `jax.vmap` "rbg" takes the first key of the batch alone.

    Both passes must do it alike.
    """
    program, key = PROGRAMS["tied"], jax.random.key(0, impl="rbg")
    rule = fx.ActivityPerturbation(num_tangents=3, memory="replay")
    assert_equal(estimates(program, rule, key=key), kept(rule, program, key))


def test_each_step_of_a_loop_has_noise_of_its_own():
    rule = fx.ActivityPerturbation(tangents=fx.tangents.Normal(), memory="replay")
    sites = rule.sites(problem_of(PROGRAMS["nested_scans"]))
    noise = jax.jit(lambda key: noise_of(rule, sites, key))(KEY)
    drawn = np.concatenate([np.ravel(u) for u in noise])
    assert (
        len(np.unique(drawn))
        == drawn.size
        == sum(site.size * 2 for site in sites.noisy)
    )


WIDTH, BATCH = 16, 256


def by_loop(params, x):
    for w, b in zip(*params, strict=True):
        x = jnp.tanh(x @ w + b)
    return jnp.sum(jnp.sin(x @ params[0][0]))


def by_scan(params, x):
    last, _ = lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None), x, params
    )
    return jnp.sum(jnp.sin(last @ params[0][0]))


def temporaries(loss, rule, depth):
    spec = jax.ShapeDtypeStruct
    params = spec((depth, WIDTH, WIDTH), jnp.float32), spec((depth, WIDTH), jnp.float32)
    if loss is by_loop:
        params = [[spec(x.shape[1:], x.dtype)] * depth for x in params]
    grad = jax.jit(fx.value_and_grad(loss, rule, in_axes=(None, 0)))
    compiled = grad.lower(KEY, params, spec((BATCH, WIDTH), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", [by_loop, by_scan])
def test_memory_does_not_grow_with_depth(loss):
    """But for one activity and the keys.

    The packing of the same live values may differ by it.
    """
    rule, activity = fx.ActivityPerturbation(memory="replay"), 4 * WIDTH * BATCH
    shallow, deep = (temporaries(loss, rule, depth) for depth in (4, 32))
    assert deep <= 1.1 * shallow + activity
    assert deep < 8 * activity


def test_the_noise_of_shards_is_independent():
    """Parameters that vary over the mesh give each shard an estimate of its own.

    Its data are the same here.
    """
    program, spec = PROGRAMS["nested_scans"], jax.sharding.PartitionSpec
    rule = fx.ActivityPerturbation(memory="replay")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(key, params, xs):
        params, xs = jax.tree.map(
            lambda x: lax.pcast(jnp.asarray(x), "d", to="varying"), (params, xs)
        )
        return jax.tree.map(
            lambda x: x[None],
            fx.grad(program.loss, rule, **program.options)(key, params, xs),
        )

    grads = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=spec(), out_specs=spec("d"))
    )(KEY, *program.args)
    for leaf in jax.tree.leaves(grads):
        assert float(jnp.max(jnp.abs(leaf[0] - leaf[1]))) > 1e-3 * float(
            jnp.max(jnp.abs(leaf))
        )


def test_draws_in_shards_have_the_mean_of_backprop():
    rule = fx.ActivityPerturbation(memory="replay", num_tangents=4096)
    got, expected = sharded([rule, fx.Backprop()])
    error = sum(np.sum((got[n] - expected[n]) ** 2) for n in PARAMS)
    assert error < 0.005 * sum(np.sum(expected[n] ** 2) for n in PARAMS)
