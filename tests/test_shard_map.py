"""Estimates inside `jax.shard_map` on eight fake devices are what `jax.grad` gives there.

They are unbiased where random.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import forwax as fx
from cases import assert_trees_close, normal

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
KEY = jax.random.key(0)
PARAMS = {"w": normal(1, 3, 2), "b": normal(2, 2), "stack": normal(4, 2, 2, 2)}
X = normal(3, 16, 3)


def loss(params, x):
    """A sum over examples, so that the devices' losses add up to that of the whole batch."""
    h = jnp.tanh(x @ params["w"] + params["b"][None])
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    return jnp.sum(h**2)


def sharded(function, in_specs, out_specs):
    return jax.jit(
        jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs)
    )


DATA_PARALLEL = {
    "weight": fx.WeightPerturbation(num_tangents=3),
    "chunked": fx.WeightPerturbation(fx.tangents.Normal(), 5, chunk_size=2),
    "signs-chunked": fx.WeightPerturbation(num_tangents=5, chunk_size=2),
    "low-rank": fx.WeightPerturbation(fx.tangents.LowRank(), 2),
    "low-rank-chunked": fx.WeightPerturbation(fx.tangents.LowRank(), 3, chunk_size=2),
    "projection": fx.WeightPerturbation(
        num_tangents=3, combine=fx.combine.Projection()
    ),
    "projection-chunked": fx.WeightPerturbation(
        num_tangents=3, combine=fx.combine.Projection(), chunk_size=2
    ),
    "shrinkage": fx.WeightPerturbation(fx.tangents.Sphere(), 2, fx.combine.Shrinkage()),
    "orthonormal": fx.WeightPerturbation(fx.tangents.Orthonormal(), 3, chunk_size=2),
    "exact": fx.Exact(),
    "exact-chunked": fx.Exact(chunk_size=3),
    "finite-difference": fx.FiniteDifference(num_tangents=3, epsilon=1e-2),
    "finite-difference-projection": fx.FiniteDifference(
        num_tangents=2, combine=fx.combine.Projection(), epsilon=1e-2
    ),
    "backprop": fx.Backprop(),
}


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_replicated_parameters_get_the_estimate_of_the_whole_batch(name):
    """As if the sum of all losses had been differentiated on one device, by the same tangents."""
    estimate = fx.value_and_grad(loss, DATA_PARALLEL[name])

    def shard(key, params, x):
        value, grads = estimate(key, params, x)
        return lax.psum(value, "data"), grads

    got = sharded(shard, (P(), P(), P("data")), (P(), P()))(KEY, PARAMS, X)
    expected = jax.jit(estimate)(KEY, PARAMS, X)
    loose = (
        {"rtol": 2e-2, "atol": 2e-2}
        if "difference" in name
        else {"rtol": 1e-4, "atol": 1e-4}
    )
    assert_trees_close(got, expected, **loose)


def test_exact_is_jax_grad_inside_shard_map():
    def both(key, params, x):
        return fx.grad(loss, fx.Exact(chunk_size=3))(key, params, x), jax.grad(loss)(
            params, x
        )

    got, expected = sharded(both, (P(), P(), P("data")), (P(), P()))(KEY, PARAMS, X)
    assert_trees_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "chunked", "exact", "finite-difference"])
def test_a_loss_summed_inside_gives_the_same(name):
    """With `psum` in the loss the slope is whole already; the key and parameters are everyone's."""
    estimate = fx.value_and_grad(
        lambda params, x: lax.psum(loss(params, x), "data"), DATA_PARALLEL[name]
    )
    got = sharded(estimate, (P(), P(), P("data")), (P(), P()))(KEY, PARAMS, X)
    expected = jax.jit(fx.value_and_grad(loss, DATA_PARALLEL[name]))(KEY, PARAMS, X)
    loose = (
        {"rtol": 2e-2, "atol": 2e-2}
        if "difference" in name
        else {"rtol": 1e-4, "atol": 1e-4}
    )
    assert_trees_close(got, expected, **loose)


def test_each_device_takes_its_own_examples():
    estimate = fx.value_and_grad(
        lambda w, x: jnp.vdot(w, x) ** 2,
        fx.WeightPerturbation(num_tangents=2),
        in_axes=(None, 0),
    )

    def shard(key, w, x):
        return jax.tree.map(
            lambda y: lax.pmean(y, "data") if y.ndim == 0 else y / 8,
            estimate(key, w, x),
        )

    got = sharded(shard, (P(), P(), P("data")), (P(), P()))(KEY, jnp.ones(3), X)
    assert_trees_close(
        got, jax.jit(estimate)(KEY, jnp.ones(3), X), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "chunked",
        "signs-chunked",
        "low-rank",
        "low-rank-chunked",
        "projection",
        "finite-difference",
    ],
)
def test_a_varying_key_gives_each_device_its_own_estimate(name):
    """That of its own batch by its own key, as if it were alone."""
    estimate = fx.grad(loss, DATA_PARALLEL[name])

    def shard(keys, params, x):
        return jax.tree.map(lambda g: g[None], estimate(keys[0], params, x))

    keys = jax.random.split(KEY, 8)
    got = sharded(shard, (P("data"), P(), P("data")), P("data"))(keys, PARAMS, X)
    expected = jax.jit(jax.vmap(estimate, (0, None, 0)))(
        keys, PARAMS, X.reshape(8, 2, 3)
    )
    loose = (
        {"rtol": 2e-2, "atol": 2e-2}
        if "difference" in name
        else {"rtol": 1e-4, "atol": 1e-4}
    )
    assert_trees_close(got, expected, **loose)
    assert not np.allclose(got["b"][0], got["b"][1])


def within(sample, expected, standard_errors=5.0) -> bool:
    """Whether the mean over axis 0 is as expected in every entry, within standard errors."""
    sample, expected = np.asarray(sample, np.float64), np.asarray(expected, np.float64)
    error = (
        sample.std(0, ddof=1) / math.sqrt(len(sample)) + 1e-5 * np.abs(expected).max()
    )
    return bool((np.abs(sample.mean(0) - expected) < standard_errors * error).all())


def test_the_mean_of_the_devices_estimates_is_unbiased():
    estimate = fx.grad(loss, fx.WeightPerturbation())

    def shard(keys, params, x):
        batch = jax.vmap(lambda key: estimate(key, params, x))(keys[0])
        return jax.tree.map(lambda g: lax.psum(g, "data"), batch)

    keys = jax.random.split(KEY, (8, 8192))
    got = sharded(shard, (P("data"), P(), P("data")), P())(keys, PARAMS, X)
    expected = jax.grad(loss)(PARAMS, X)
    for leaf, true in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert within(leaf, true)
        assert not within(leaf, 1.3 * true)


WEIGHTS = normal(5, 8)
FEATURES = normal(6, 8)


def sharded_loss(w, x):
    """Parameters and features in shards, one objective."""
    return jnp.sin(lax.psum(jnp.sum(w * x), "data"))


def mixed_loss(params, x):
    """A sharded vector and a replicated scale and vector."""
    inner = lax.psum(jnp.sum(params["sharded"] * x), "data")
    return jnp.sin(inner * params["scale"]) + jnp.sum(params["vector"] ** 2)


MIXED = {"sharded": WEIGHTS, "scale": jnp.asarray(0.7), "vector": normal(7, 3)}
MIXED_SPECS = {"sharded": P("data"), "scale": P(), "vector": P()}


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_sharded_parameters_get_an_unbiased_estimate(chunk_size):
    """Every shard draws its own noise from the one key; the slope is everyone's."""
    rule = fx.WeightPerturbation(num_tangents=3, chunk_size=chunk_size)

    def shard(keys, w, x):
        return jax.vmap(lambda key: fx.grad(sharded_loss, rule)(key, w, x))(keys)

    got = sharded(shard, (P(), P("data"), P("data")), P(None, "data"))(
        jax.random.split(KEY, 8192), WEIGHTS, FEATURES
    )
    true = jax.grad(lambda w: jnp.sin(jnp.vdot(w, FEATURES)))(WEIGHTS)
    assert within(got, true)
    assert not within(got, 1.1 * true)
    errors = np.sum((np.asarray(got) - np.asarray(true)) ** 2, 1) / np.sum(
        np.asarray(true) ** 2
    )
    assert within(
        errors[:, None], [(8 - 1) / 3]
    )  # the law of eight independent signs: no two shards draw alike


SIDE_BY_SIDE = [
    fx.WeightPerturbation(num_tangents=2),
    fx.WeightPerturbation(fx.tangents.Normal(), 3, chunk_size=2),
    fx.FiniteDifference(num_tangents=2, epsilon=0.01),
]


@pytest.mark.parametrize("rule", SIDE_BY_SIDE, ids=repr)
def test_sharded_and_replicated_parameters_side_by_side(rule):
    def shard(keys, params, x):
        return jax.vmap(lambda key: fx.grad(mixed_loss, rule)(key, params, x))(keys)

    out = {"sharded": P(None, "data"), "scale": P(), "vector": P()}
    keys = jax.random.split(KEY, 8192)
    got = sharded(shard, (P(), MIXED_SPECS, P("data")), out)(keys, MIXED, FEATURES)

    def one_device(params):
        return jnp.sin(
            jnp.vdot(params["sharded"], FEATURES) * params["scale"]
        ) + jnp.sum(params["vector"] ** 2)

    true = jax.grad(one_device)(MIXED)
    for name, leaf in got.items():
        assert within(leaf, true[name]), name
        assert not within(leaf, 1.3 * true[name]), name


def run_mixed(rule, loss=mixed_loss, params=MIXED, specs=MIXED_SPECS):
    """Trace only: what is refused is refused before anything runs."""
    function = functools.partial(fx.grad(loss, rule), KEY)
    mapped = jax.shard_map(
        function, mesh=MESH, in_specs=(specs, P("data")), out_specs=specs
    )
    return jax.eval_shape(mapped, params, FEATURES)


COUPLED = [
    fx.tangents.Orthonormal(),
    fx.tangents.Sphere(),
    fx.tangents.Coordinate(),
    fx.tangents.Coordinate(replace=False),
]


@pytest.mark.parametrize("tangents", COUPLED, ids=str)
def test_coupled_tangents_are_refused_for_sharded_parameters(tangents):
    rule = fx.WeightPerturbation(tangents)
    name = type(tangents).__name__
    with pytest.raises(
        ValueError,
        match=f"{name} couples all coordinates of a direction, so inside shard_map",
    ):
        run_mixed(rule)
    with pytest.raises(
        ValueError,
        match=rf"tangents={name} needs all coordinates.*Use tangents.Rademacher\(\)",
    ):
        run_mixed(rule, sharded_loss, WEIGHTS, P("data"))


@pytest.mark.parametrize(
    "make",
    [lambda: fx.combine.Projection(), lambda: fx.combine.ControlVariate(WEIGHTS[:1])],
)
def test_coupled_combinations_are_refused_for_sharded_parameters(make):
    rule = fx.WeightPerturbation(combine=make())
    name = type(rule.combine).__name__
    with pytest.raises(
        ValueError, match=rf"combine={name} needs all coordinates.*Use combine.Mean\(\)"
    ):
        run_mixed(rule, sharded_loss, WEIGHTS, P("data"))
    if name == "Projection":
        with pytest.raises(
            ValueError,
            match=rf"combine={name} needs all coordinates.*Use combine.Mean\(\)",
        ):
            run_mixed(rule)


def test_exact_is_refused_for_sharded_parameters():
    for arguments in ((), (sharded_loss, WEIGHTS, P("data"))):
        with pytest.raises(
            ValueError, match="Exact: inside shard_map every parameter must be one that"
        ):
            run_mixed(fx.Exact(), *arguments)


def test_a_mesh_of_two_axes():
    """Batch over one axis, parameters over the other.

    The slope is summed over the first and not over the second.
    """
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def two(w, x):
        hidden = lax.psum(x @ w, "model")
        return jnp.sum(hidden**2)

    def shard(keys, w, x):
        return jax.vmap(
            lambda key: fx.grad(two, fx.WeightPerturbation(num_tangents=2))(key, w, x)
        )(keys)

    specs = (P(), P("model"), P("data", "model"))
    function = jax.shard_map(
        shard, mesh=mesh, in_specs=specs, out_specs=P(None, "model")
    )
    w, x = normal(8, 4), normal(9, 8, 4)
    got = jax.jit(function)(jax.random.split(KEY, 8192), w, x)
    true = jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)
    assert within(got, true)
    assert not within(got, 1.1 * true)


def test_check_vma_off_gives_each_device_its_own():
    """Then nothing is known to vary, and nothing is summed."""
    estimate = fx.grad(loss, fx.Exact())
    function = jax.shard_map(
        lambda params, x: jax.tree.map(lambda g: g[None], estimate(KEY, params, x)),
        mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False,
    )  # fmt: skip
    got = jax.jit(function)(PARAMS, X)
    expected = jax.vmap(lambda x: jax.grad(loss)(PARAMS, x))(X.reshape(8, 2, 3))
    assert_trees_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "chunked", "projection", "exact-chunked"])
def test_jit_with_sharded_inputs_gives_the_same(name):
    estimate = jax.jit(fx.value_and_grad(loss, DATA_PARALLEL[name]))
    x = jax.device_put(X, NamedSharding(MESH, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(MESH, P()))
    assert len(x.sharding.device_set) == 8
    assert_trees_close(
        estimate(KEY, params, x), estimate(KEY, PARAMS, X), rtol=1e-4, atol=1e-4
    )


EXPLICIT = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))


@pytest.mark.parametrize(
    "name", ["weight", "signs-chunked", "chunked", "low-rank-chunked", "exact-chunked"]
)
def test_explicit_mesh_axes_give_the_same(name):
    """The types then say how arrays are split."""
    estimate = jax.jit(fx.value_and_grad(loss, DATA_PARALLEL[name]))
    x = jax.device_put(X, NamedSharding(EXPLICIT, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(EXPLICIT, P()))
    assert_trees_close(
        estimate(KEY, params, x), estimate(KEY, PARAMS, X), rtol=1e-4, atol=1e-4
    )
    step = jax.jit(fx.update(loss, fx.WeightPerturbation(), learning_rate=0.1))
    assert_trees_close(step(KEY, params, x), step(KEY, PARAMS, X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rule",
    [fx.ActivityPerturbation(), fx.DirectFeedbackAlignment(KEY)],
    ids=["activity", "dfa"],
)
def test_sites_refuse_explicit_mesh_axes(rule):
    x = jax.device_put(X, NamedSharding(EXPLICIT, P("data")))
    says = (
        r"expected arrays that are not split over explicit mesh axes, got "
        r"float32\[16@data,3\].*AxisType.Auto"
    )
    of_example = lambda params, x: loss(params, jnp.atleast_2d(x))
    for in_axes in (None, (None, 0)):
        with pytest.raises(ValueError, match=f"{type(rule).__name__}: {says}"):
            jax.jit(fx.grad(of_example, rule, in_axes=in_axes))(KEY, PARAMS, x)


def test_feedback_alignment_takes_explicit_mesh_axes():
    rule = fx.FeedbackAlignment(fx.random_feedback(KEY, PARAMS))
    x = jax.device_put(X, NamedSharding(EXPLICIT, P("data")))
    params, estimate = (
        jax.device_put(PARAMS, NamedSharding(EXPLICIT, P())),
        jax.jit(fx.grad(loss, rule)),
    )
    assert_trees_close(
        estimate(KEY, params, x), estimate(KEY, PARAMS, X), rtol=1e-4, atol=1e-4
    )


def test_several_accelerators_talk_once_a_step(monkeypatch):
    """The order of layers must not be a condition that every device has to hear of."""
    monkeypatch.setattr("forwax._programs.order.has_several_accelerators", lambda: True)
    x = jax.device_put(X, NamedSharding(MESH, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(MESH, P()))
    estimate = jax.jit(fx.grad(loss, fx.WeightPerturbation()))
    text = estimate.lower(KEY, params, x).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
    got = estimate(KEY, params, x)
    monkeypatch.undo()
    assert_trees_close(
        got, jax.jit(fx.grad(loss))(KEY, PARAMS, X), rtol=1e-4, atol=1e-4
    )


def test_jit_with_sharded_parameters_gives_the_same():
    estimate = jax.jit(
        fx.value_and_grad(
            lambda w: jnp.sum(jnp.sin(w) ** 2), fx.WeightPerturbation(num_tangents=4)
        )
    )
    w = normal(4, 64)
    split = jax.device_put(w, NamedSharding(MESH, P("data")))
    assert_trees_close(estimate(KEY, split), estimate(KEY, w), rtol=1e-4, atol=1e-4)
