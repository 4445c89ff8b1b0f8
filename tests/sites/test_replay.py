"""`memory="replay"`: the estimate of `keep` for the same noise, from temporaries that do not grow with depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._signature import Signature
from forwax._sites.passes import keep
from sites.drawn import noise_of
from sites.programs import PROGRAMS
from sites.test_sharding import PARAMS, sharded

KEY = jax.random.key(3)
SOME = ["local_losses", "nested_scans", "parameters_in_carries"]


def kept(rule, program):
    """The estimate from recorded inputs, with the noise that `replay` draws."""

    def estimate(key, *args):
        problem = Signature(program.loss, 0, False, program.in_axes).bind(args, {})
        sites = rule.sites(problem)
        noise = noise_of(sites, rule._source(key, sites))
        out = keep.push(sites, noise, rule.num_tangents)
        return keep.value(sites, out.losses), rule._own(
            sites, noise, rule._slopes(sites, out), out.records
        )

    return jax.jit(estimate)


def assert_equal(got, expected):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("name", SOME)
def test_it_is_the_estimate_of_keep_for_the_same_noise(name):
    program = PROGRAMS[name]
    rule = fx.ActivityPerturbation(tangents=fx.tangents.Normal(), num_tangents=2, memory="replay")
    got = jax.jit(fx.value_and_grad(program.loss, rule, **program.options))(KEY, *program.args)
    assert_equal(got, kept(rule, program)(KEY, *program.args))


@pytest.mark.parametrize("name", ["batch_loss", "complex_activities"])
def test_signs_without_examples_and_of_complex_values(name):
    program = PROGRAMS[name]
    rule = fx.ActivityPerturbation(memory="replay")
    got = jax.jit(fx.value_and_grad(program.loss, rule, **program.options))(KEY, *program.args)
    assert_equal(got, kept(rule, program)(KEY, *program.args))


@pytest.mark.parametrize(
    ("name", "tangents"),
    [
        ("nested_scans", fx.tangents.Orthonormal()),
        ("parameters_in_carries", fx.tangents.Orthonormal()),
        ("tied", fx.tangents.Hadamard()),
    ],
)
def test_noise_that_is_held_is_that_of_keep(name, tangents):
    program = PROGRAMS[name]
    keep, replay = (
        fx.ActivityPerturbation(tangents=tangents, num_tangents=2, memory=memory)
        for memory in ("keep", "replay")
    )
    both = [
        jax.jit(fx.value_and_grad(program.loss, rule, **program.options)) for rule in (keep, replay)
    ]
    assert_equal(*(f(KEY, *program.args) for f in both))


def test_noise_from_a_generator_that_cannot_be_mapped():
    """Under `jax.vmap` "rbg" takes the first key of the batch alone: both passes must do it alike."""
    program, key = PROGRAMS["tied"], jax.random.key(0, impl="rbg")
    rule = fx.ActivityPerturbation(num_tangents=3, memory="replay")
    got = jax.jit(fx.value_and_grad(program.loss, rule, **program.options))(key, *program.args)
    assert_equal(got, kept(rule, program)(key, *program.args))


def test_each_step_of_a_loop_has_noise_of_its_own():
    program = PROGRAMS["nested_scans"]
    rule = fx.ActivityPerturbation(tangents=fx.tangents.Normal(), memory="replay")
    sites = rule.sites(Signature(program.loss, 0, False, program.in_axes).bind(program.args, {}))
    noise = jax.jit(lambda key: noise_of(sites, rule._source(key, sites)))(KEY)
    drawn = np.concatenate([u.ravel() for u in noise])
    assert len(np.unique(drawn)) == drawn.size == sum(site.size * 2 for site in sites.noisy)


WIDTH, BATCH = 16, 256


def by_loop(params, x):
    for w, b in zip(*params, strict=True):
        x = jnp.tanh(x @ w + b)
    return jnp.sum(jnp.sin(x @ params[0][0]))


def by_scan(params, x):
    last, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None), x, params)
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
    """But for one activity, by which the packing of the same live values may differ, and the keys."""
    rule, activity = fx.ActivityPerturbation(memory="replay"), 4 * WIDTH * BATCH
    shallow, deep = (temporaries(loss, rule, depth) for depth in (4, 32))
    assert deep <= 1.1 * shallow + activity
    assert deep < 8 * activity


def test_the_noise_of_shards_is_independent():
    """Parameters that vary over the mesh give each shard an estimate of its own; its data are the same here."""
    program, spec = PROGRAMS["nested_scans"], jax.sharding.PartitionSpec
    rule = fx.ActivityPerturbation(memory="replay")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(key, params, xs):
        params, xs = jax.tree.map(
            lambda x: lax.pcast(jnp.asarray(x), "d", to="varying"), (params, xs)
        )
        return jax.tree.map(
            lambda x: x[None], fx.grad(program.loss, rule, **program.options)(key, params, xs)
        )

    grads = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec(), out_specs=spec("d")))(
        KEY, *program.args
    )
    for leaf in jax.tree.leaves(grads):
        assert float(jnp.max(jnp.abs(leaf[0] - leaf[1]))) > 1e-3 * float(jnp.max(jnp.abs(leaf)))


def test_draws_in_shards_have_the_mean_of_backprop():
    rule = fx.ActivityPerturbation(memory="replay", num_tangents=4096)
    got, expected = sharded(rule, check=True), sharded(fx.Backprop(), check=True)
    error = sum(float(jnp.sum((got[n] - expected[n]) ** 2)) for n in PARAMS)
    assert error < 0.005 * sum(float(jnp.sum(expected[n] ** 2)) for n in PARAMS)
