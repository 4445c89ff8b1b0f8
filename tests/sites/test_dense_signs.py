"""Dense signs that a trace forms where they are used.

The numbers of signs that are drawn and held at once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from cases import assert_trees_close, normal
from forwax._directions.signs import Places, draw_signs
from forwax._tree import Spec
from forwax.tangents.rademacher import draw_words, words_at

KEY = jax.random.key(7)
SPECS = [
    Spec(shape, jnp.dtype("float32"))
    for shape in ((5,), (3, 64, 64), (2, 7), (2, 2, 64, 64), (33,))
]


def test_words_at_any_place_are_those_of_one_draw():
    """Also a generator's own way is held here.

    JAX says that each word depends on the key and its place alone.
    """
    whole = jnp.concatenate(draw_words(KEY, SPECS))
    places = jnp.array([0, 1, 5, 300, len(whole) - 1], jnp.uint32)
    assert np.array_equal(words_at(jax.random.key_data(KEY), places), whole[places])
    assert not np.array_equal(
        words_at(jax.random.key_data(KEY), places + 1), whole[places]
    )


def test_signs_drawn_later_are_the_signs():
    """Whole and by rows, for several tangents, beside others that are drawn at once."""
    late, rows = [len(spec.shape) > 2 for spec in SPECS], jnp.arange(2)
    signs = draw_signs(KEY, SPECS, rows, late)
    assert [isinstance(each.words, Places) for each in signs] == late
    expected = fx.tangents.Rademacher().sample(
        KEY, [jnp.zeros(spec.shape) for spec in SPECS], 2
    )
    for got, whole in zip(signs, expected, strict=True):
        assert np.array_equal(got.unpack(), whole)
    assert np.array_equal(signs[1].row(jnp.asarray(2)).unpack(), expected[1][:, 2])
    assert np.array_equal(
        signs[3].row(jnp.asarray(1)).row(jnp.asarray(0)).unpack(), expected[3][:, 1, 0]
    )


def stack(params, x):
    """A scan in a scan, one that runs backwards, rows of many signs and of few, and whole uses."""
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    h, _ = lax.scan(lambda h, ws: lax.scan(layer, h, ws), x, params["nested"])
    h, _ = lax.scan(layer, h, params["back"], reverse=True)
    h, _ = lax.scan(lambda h, b: (h + b, None), h, params["few"])
    return jnp.sum(((h + params["both"][0]) @ params["whole"]) ** 2) + jnp.sum(
        params["both"] ** 2
    )


def parameters():
    small = lambda i, *shape: normal(i, *shape) / 8
    return {
        "nested": small(0, 2, 2, 64, 64),
        "back": small(1, 3, 64, 64).astype(jnp.bfloat16).astype(jnp.float32),
        "few": small(2, 2, 1, 64),
        "both": small(3, 2, 1, 64),
        "whole": small(4, 64, 3),
    }


def held(loss, key, params, num_tangents):
    """The definition: a Jacobian-vector product along every direction."""
    directions = fx.tangents.Rademacher().sample(key, params, num_tangents)
    value, slopes = jax.vmap(
        lambda v: jax.jvp(loss, (params,), (v,)), out_axes=(None, 0)
    )(directions)
    return value, jax.tree.map(
        lambda v: jnp.tensordot(slopes, v, axes=1) / num_tangents, directions
    )


CASES = {
    "one": (1, None, lambda: jax.random.key(3), True),
    "chunks": (3, 2, lambda: jax.random.key(3), True),
    "not-by-place": (3, None, lambda: jax.random.key(3), False),
    "rbg": (3, None, lambda: jax.random.key(3, impl="rbg"), True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_trace_gives_the_numbers_of_held_directions(name):
    num_tangents, chunk_size, make, partitionable = CASES[name]
    params, x = parameters(), normal(5, 2, 64)
    rule = fx.WeightPerturbation(num_tangents=num_tangents, chunk_size=chunk_size)
    with jax.threefry_partitionable(partitionable):

        @jax.jit
        def all_three(key, params):
            loss = lambda params: stack(params, x)
            value, new = fx.update(loss, rule, learning_rate=1.0)(key, params)
            return (
                fx.value_and_grad(loss, rule)(key, params),
                (value, new),
                held(loss, key, params, num_tangents),
            )

        got, (value, new), expected = all_three(make(), params)
    assert_trees_close(
        got, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected[1]["whole"]).max())
    )
    assert_trees_close(
        (value, jax.tree.map(jnp.subtract, params, new)), got, rtol=1e-4, atol=1e-4
    )


def test_an_eager_loss_may_branch_on_values():
    """Outside of a trace nothing is planned; inside `jax.jvp` or `jax.vmap` alone neither."""
    loss = lambda w, flip: jnp.sum(w**2) * (-1 if flip > 0 else 1)
    w, flip = jnp.array([1.0, 2.0]), jnp.asarray(1.0)
    grads = lambda w: fx.grad(loss)(KEY, w, flip)
    assert float(grads(w) @ w) < 0
    assert_trees_close(jax.vmap(grads)(w[None])[0], grads(w))
    assert_trees_close(jax.jvp(grads, (w,), (w,))[0], grads(w))


def test_a_custom_rule_may_close_over_values_of_the_loss():
    """As under `jax.grad`; the loss is then evaluated itself, not what was traced of it."""

    def loss(w, x):
        scale = jnp.mean(x)
        f = jax.custom_jvp(lambda h: h * scale)
        f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * scale))
        return jnp.sum(f(w) ** 2)

    w, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])
    grads = jax.jit(fx.grad(loss))(KEY, w, x)
    assert_trees_close(grads, fx.grad(loss)(KEY, w, x))
    step = jax.jit(fx.update(loss, learning_rate=1.0))
    assert_trees_close(step(KEY, w, x)[1], w - grads)


TANGENTS = {"signs": fx.tangents.Rademacher(), "low-rank": fx.tangents.LowRank()}


@pytest.mark.parametrize("name", TANGENTS)
def test_callbacks_without_a_result_run_once(name):
    seen = []

    def loss(w, x):
        jax.debug.callback(lambda w: seen.append(w.shape), w)
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    value, _ = jax.jit(fx.value_and_grad(loss, fx.WeightPerturbation(TANGENTS[name])))(
        KEY, jnp.ones((3, 2)), jnp.eye(3)
    )
    jax.effects_barrier()
    assert value > 0
    assert seen == [(3, 2)]


@pytest.mark.parametrize("name", TANGENTS)
def test_parameters_without_entries(name):
    params = {"none": jnp.ones((0, 4)), "w": jnp.ones((4, 2))}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["none"] @ p["w"])
    rule = fx.WeightPerturbation(TANGENTS[name], 3)
    value, grads = jax.jit(fx.value_and_grad(loss, rule))(KEY, params)
    _, new = jax.jit(fx.update(loss, rule, learning_rate=1.0))(KEY, params)
    assert float(value) == 8
    assert grads["none"].shape == new["none"].shape == (0, 4)
    assert_trees_close(new["w"], params["w"] - grads["w"], rtol=1e-5)


def test_nothing_to_differentiate():
    rule = fx.WeightPerturbation(num_tangents=2, combine=fx.combine.Shrinkage())
    for params in ({}, jnp.zeros((0, 2))):
        value, grads = jax.jit(fx.value_and_grad(lambda p: jnp.asarray(3.0), rule))(
            KEY, params
        )
        assert float(value) == 3
        assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_eight_bit_floats():
    w = jnp.ones(3, jnp.float8_e4m3fn)
    grads = jax.jit(fx.grad(lambda w: jnp.sum(w.astype(jnp.float32))))(KEY, w)
    assert grads.dtype == w.dtype
    assert float(jnp.abs(grads.astype(jnp.float32)).min()) >= 1
