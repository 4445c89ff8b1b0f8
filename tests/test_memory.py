"""Law 7: the compiled temporaries of weight perturbation do not grow with depth, chunked or not.

Only compiles: nothing here depends on the machine's speed or load.
"""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx

WIDTH, BATCH = 16, 64
ACTIVATION = WIDTH * BATCH * 4  # bytes of one layer's activity


def scanned(depth):
    """A tanh-RNN of one weight matrix, by `lax.scan`."""

    def loss(w, x):
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=depth)
        return jnp.sum(h**2)

    return loss


def unrolled(depth):
    """The same without a loop, so that XLA sees every layer."""

    def loss(w, x):
        for _ in range(depth):
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    return loss


def temporaries(loss, rule) -> int:
    """Bytes."""
    args = jax.random.key(0), jnp.zeros((WIDTH, WIDTH)), jnp.zeros((BATCH, WIDTH))
    compiled = jax.jit(fx.value_and_grad(loss, rule)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


FLAT = {
    "one": fx.WeightPerturbation(),
    "unchunked": fx.WeightPerturbation(num_tangents=4),
    "chunked": fx.WeightPerturbation(num_tangents=4, chunk_size=2),
    "normals": fx.WeightPerturbation(fx.tangents.Normal(), 4, chunk_size=2),
    "chunked-unevenly": fx.WeightPerturbation(num_tangents=5, chunk_size=2),
    "projection": fx.WeightPerturbation(
        num_tangents=4, combine=fx.combine.Projection(), chunk_size=2
    ),
    "exact": fx.Exact(chunk_size=4),
    "finite-difference": fx.FiniteDifference(num_tangents=4),
}


@pytest.mark.parametrize("name", FLAT)
def test_temporaries_are_flat_in_the_depth_of_a_scan(name):
    shallow, middle, deep = (
        temporaries(scanned(depth), FLAT[name]) for depth in (8, 64, 512)
    )
    assert middle == pytest.approx(shallow, rel=0.05)
    assert deep == pytest.approx(shallow, rel=0.05)


def test_those_of_backprop_grow():
    shallow, middle, deep = (
        temporaries(scanned(depth), fx.Backprop()) for depth in (8, 64, 512)
    )
    assert middle > shallow + 50 * ACTIVATION
    assert deep > shallow + 500 * ACTIVATION


def stacked(params, x):
    """An MLP by `lax.scan` over its layers, each with parameters of its own."""
    h, _ = jax.lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None), x, params
    )
    return jnp.sum(h**2)


STACKED = {
    "low-rank": (32, fx.WeightPerturbation(fx.tangents.LowRank())),
    "low-ranks": (32, fx.WeightPerturbation(fx.tangents.LowRank(), 2)),
    "signs": (64, fx.WeightPerturbation()),
    "signs-in-chunks": (64, fx.WeightPerturbation(num_tangents=4, chunk_size=2)),
}


def of_a_stack(name, depth, *, step=False):
    """Bytes of a gradient, or of a step that holds none, parameters donated."""
    width, rule = STACKED[name]
    params = {"w": jnp.zeros((depth, width, width)), "b": jnp.zeros((depth, 1, width))}
    f = (
        fx.update(stacked, rule, learning_rate=0.1)
        if step
        else fx.value_and_grad(stacked, rule)
    )
    lowered = jax.jit(f, donate_argnums=1 if step else ()).lower(
        jax.random.key(0), params, jnp.zeros((1024, width))
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("step", [False, True], ids=["gradient", "step"])
@pytest.mark.parametrize("name", STACKED)
def test_temporaries_are_flat_in_the_number_of_layers_of_a_scan(name, step):
    """Signs of all layers would be as large as a layer's activities here, dense ones as words."""
    assert of_a_stack(name, 256, step=step) <= 1.05 * of_a_stack(name, 8, step=step)


def test_dense_signs_are_not_flat_where_the_generator_has_no_places():
    """Then they are held as words: what drawing each layer's in its step saves."""
    with jax.threefry_partitionable(False):
        assert of_a_stack("signs", 1024) > 1.2 * of_a_stack("signs", 8)


CHUNKED = {name: FLAT[name] for name in ("chunked", "exact")}


@pytest.mark.parametrize("name", CHUNKED)
def test_temporaries_are_flat_in_the_depth_of_a_stack(name):
    shallow, deep = (temporaries(unrolled(depth), CHUNKED[name]) for depth in (8, 32))
    assert deep == pytest.approx(shallow, rel=0.05)


@pytest.mark.parametrize("name", ["normals", "exact"])
def test_without_the_barrier_every_activity_is_stored(name, monkeypatch):
    """XLA then hoists the primal out of the loop over chunks.

    What the barrier in the chunk's body prevents.
    """
    monkeypatch.setattr("forwax._pushforward.lax.optimization_barrier", lambda x: x)
    shallow, deep = (temporaries(unrolled(depth), FLAT[name]) for depth in (8, 32))
    assert deep > shallow + 20 * ACTIVATION


CHUNKS_WITH_AUX = {
    "chunked": fx.WeightPerturbation(num_tangents=16, chunk_size=1),
    "exact": fx.Exact(chunk_size=4),
    "finite-difference": fx.FiniteDifference(num_tangents=16),
    "update": None,
}


@pytest.mark.parametrize("name", CHUNKS_WITH_AUX)
def test_aux_is_held_once(name):
    """Not once a chunk or evaluation."""
    loss = lambda w, x: (
        jnp.sum(x @ w),
        {"large": jnp.tanh(x @ w), "key": jax.random.key(0)},
    )
    if name == "update":
        step = fx.update(
            loss, CHUNKS_WITH_AUX["chunked"], learning_rate=0.1, has_aux=True
        )
    else:
        step = fx.value_and_grad(loss, CHUNKS_WITH_AUX[name], has_aux=True)
    args = jax.random.key(0), jnp.zeros((4, 16)), jnp.zeros((1024, 4))
    held = jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert held < 4.5 * 4 * 16 * 1024


def test_the_aux_of_a_finite_difference_is_that_of_the_first_evaluation():
    rule, key, w = (
        fx.FiniteDifference(num_tangents=2, epsilon=0.25),
        jax.random.key(0),
        jnp.zeros(3),
    )
    estimate = fx.grad(lambda w: (jnp.sum(w), w), rule, has_aux=True)
    first = 0.25 * rule.tangents.sample(key, w, 2)[0]
    for aux in (estimate(key, w)[1], jax.jit(estimate)(key, w)[1]):
        assert aux.tolist() == first.tolist()


def test_independent_tangents_hold_one_chunk():
    """Many tangents of many parameters: what is held is a chunk's, not all k."""
    n, k = 1 << 16, 32

    def loss(w):
        return jnp.sum(jnp.sin(w))

    def held(rule):
        compiled = (
            jax.jit(fx.value_and_grad(loss, rule))
            .lower(jax.random.key(0), jnp.zeros(n))
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes / (4 * n)

    assert held(fx.WeightPerturbation(num_tangents=k, chunk_size=2)) < 12
    assert held(fx.FiniteDifference(num_tangents=k)) < 12
    assert (
        held(
            fx.WeightPerturbation(
                num_tangents=k, chunk_size=2, combine=fx.combine.Projection()
            )
        )
        > k
    )
