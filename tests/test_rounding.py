"""Parameters in half precision, rounded by chance: the mean, the independence, the memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import forwax as fx
from forwax._directions.rounding import Rounding

KEY = jax.random.key(0)
T = fx.tangents
W = fx.WeightPerturbation
HALF = ["bfloat16", "float16"]


def rounded(values, dtype, seed=0, **options):
    """In float64, by NumPy."""
    by_chance = Rounding.by_chance(jax.random.key(seed))
    return np.float64(np.float32(by_chance.cast(jnp.asarray(values), dtype, **options)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "value", [0.05, -1.2345, 3e-6, -1e-7, 2e4, 2.0**-14 - 1e-9, 0.0, 1.0]
)
def test_the_mean_is_the_number_and_both_neighbours_are_taken(value, dtype):
    n = 1 << 16
    exact = np.float64(np.float32(value))
    got = rounded(np.full(n, value, np.float32), dtype)
    below, above = got.min(), got.max()
    if below == above:  # exact in both types
        assert below == pytest.approx(exact, abs=2.0**-38)
        return
    assert below < exact < above
    after = jnp.nextafter(jnp.asarray(below, dtype), jnp.asarray(above, dtype))
    assert float(after) == above
    assert abs(got.mean() - exact) < 4 * got.std() / math.sqrt(n) + 2.0**-38


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_finite_stays(dtype):
    values = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    assert str(rounded(values, dtype)) == str(np.float64(np.float32(values)))
    assert jnp.isinf(Rounding.by_chance(KEY).cast(jnp.float32(3e38), "float16"))


def test_neighbours_leaves_steps_and_passes_are_uncorrelated():
    n = 1 << 16
    half = 1 + jnp.full(n, 2.0**-8, jnp.float32)  # midway between two numbers
    up = lambda rounding: np.where(
        np.float32(rounding.cast(half, "bfloat16")) > 1, 1, -1
    )
    first = Rounding.by_chance(KEY)
    base = up(first.of(0).of(0))
    others = {
        "neighbour": np.roll(base, 1),
        "row": np.roll(base, 256),
        "leaf": up(first.of(0).of(1)),
        "pass": up(first.of(1).of(0)),
        "step": up(Rounding.by_chance(jax.random.key(1)).of(0).of(0)),
        "signs": np.asarray(T.Rademacher().sample(KEY, half)[0]),
    }
    assert abs(base.mean()) < 4 / math.sqrt(n)
    for name, other in others.items():
        assert abs((base * other).mean()) < 4 / math.sqrt(n), name


def test_a_block_gets_the_bits_of_its_place():
    values = jax.random.normal(KEY, (6, 5, 4))
    whole = rounded(values, "bfloat16")
    for i in range(6):
        part = rounded(values[i], "bfloat16", offset=20 * i)
        np.testing.assert_array_equal(part, whole[i])


def test_500_steps_of_a_millionth_move_a_parameter_as_far_as_in_float32():
    """From 0.05, where the spacing is 2.4e-4, by 5e-4; to the nearest not at all."""
    n = 1 << 13
    start = jnp.full(n, 0.05, jnp.bfloat16)
    keys = jax.vmap(lambda key: jax.random.split(key, n))(jax.random.split(KEY, 500))

    @functools.partial(jax.jit, static_argnums=0)
    def descend(rounding):
        # One parameter: each estimate is the slope itself.
        loss = lambda w: w.astype(jnp.float32)
        step = jax.vmap(fx.update(loss, learning_rate=1e-6, rounding=rounding))
        return jax.lax.scan(lambda w, keys: (step(keys, w)[1], None), start, keys)[0]

    moved = np.float64(np.float32(start)) - np.float64(
        np.float32(descend("stochastic"))
    )
    assert abs(moved.mean() - 5e-4) < 4 * moved.std() / math.sqrt(n)
    spread = math.sqrt(500 * 1e-6 * 2.0**-12)  # of 500 roundings that are independent
    assert moved.std() == pytest.approx(spread, rel=0.05)
    assert not np.any(np.float32(start) - np.float32(descend("nearest")))


PATHS = {
    "signs": (W(), None),
    "several": (W(num_tangents=3, chunk_size=1), None),
    "factors": (W(T.LowRank(2), 12), None),
    "momentum": (W(T.LowRank(), 2), fx.Momentum(0.5, 3)),
    "safe": (fx.Safe(W()).init(), None),
}


def total(params):
    """Slopes that are the same wherever the parameters are."""
    parts = [jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(params)]
    return functools.reduce(lambda a, b: a + 0.5 * b, parts)


def start(dtype):
    shapes = {"stack": (2, 64, 128), "matrix": (128, 64), "vector": (512,)}
    return {name: jnp.full(s, 0.05).astype(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in PATHS), ("signs", "float16")]
)
def test_every_way_to_add_moves_parameters_as_in_float32(name, dtype):
    """Along the same directions, from the same numbers; to the nearest the steps are lost."""
    rule, momentum = PATHS[name]

    @functools.partial(jax.jit, static_argnums=3)
    def step(key, params, held, rounding):
        update = fx.update(
            total, rule, learning_rate=1e-8, momentum=held, rounding=rounding
        )
        _, params, *state = update(key, params)
        return params, momentum and state[-1]

    def steps(params, rounding):
        held = momentum and momentum.init(KEY, rule)
        for key in jax.random.split(KEY, 4):
            params, held = step(key, params, held, rounding)
        return params

    first = jax.tree.map(lambda x: x.astype(jnp.float32), start(dtype))
    exact = steps(first, "stochastic")
    for a, b in zip(
        *map(jax.tree.leaves, (exact, steps(first, "nearest"))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # wide ones are what they were
    got = steps(start(dtype), "stochastic")
    for leaf in first:
        error = np.float64(np.float32(got[leaf])) - np.float64(exact[leaf])
        assert error.std() > 0
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(error.size)


def test_a_loss_and_its_sharded_twin_get_the_same_bits():
    """And so do tangents one at a time, and eagerly."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    spec = {"stack": Spec(None, "x"), "matrix": Spec(None, "x"), "vector": Spec("x")}
    split = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)

    def step(params, chunk_size=None):
        rule = W(num_tangents=2, chunk_size=chunk_size)
        update = fx.update(total, rule, learning_rate=1e-7, rounding="stochastic")
        return update(KEY, params)[1]

    params = start("bfloat16")
    whole = jax.jit(step)(params)
    sharded = jax.jit(step, out_shardings=split)(jax.device_put(params, split))
    chunked = jax.jit(functools.partial(step, chunk_size=1))(params)
    eager = step(params)
    for name, value in whole.items():
        assert len(set(np.float32(value).ravel())) > 1
        for other in (sharded, chunked, eager):
            np.testing.assert_array_equal(np.float32(value), np.float32(other[name]))


# --- memory ---


def chain(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def stack(w, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def halves(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@pytest.mark.parametrize(
    "rule", [W(), W(T.LowRank()), W(num_tangents=3, chunk_size=1)], ids=str
)
@pytest.mark.parametrize("loss", [chain, stack])
def test_no_temporaries_beyond_those_of_nearest(loss, rule):
    params = [halves(256, 256)] * 4 if loss is chain else halves(8, 256, 256)

    def held(rounding):
        step = fx.update(loss, rule, learning_rate=0.1, rounding=rounding)
        compiled = jax.jit(step, donate_argnums=1).lower(KEY, params, halves(4, 256))
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert held("stochastic") <= held("nearest") + 4096


def test_other_roundings_are_refused():
    with pytest.raises(ValueError, match=r'"nearest" or "stochastic", got \'up\''):
        fx.update(total, learning_rate=0.1, rounding="up")
