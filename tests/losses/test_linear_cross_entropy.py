"""The head in chunks against the plain loss: values, derivatives, memory."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax import lm
from forwax.losses import linear_cross_entropy, softmax_cross_entropy

KEY = jax.random.key(0)
SHAPES = {
    "several": ((5, 7), 8),
    "one": ((6,), 64),
    "whole": ((8, 4), 16),
    "none": ((), 3),
}


def plain(hidden, weights, labels, mask=None):
    losses = softmax_cross_entropy(hidden @ weights.T, labels)
    return losses if mask is None else jnp.where(mask, losses, 0)


def inputs(lead, num_classes=11, width=6):
    keys = jax.random.split(KEY, 4)
    hidden = jax.random.normal(keys[0], (*lead, width))
    weights = jax.random.normal(keys[1], (num_classes, width))
    labels = jax.random.randint(keys[2], lead, 0, num_classes)
    return hidden, weights, labels, jax.random.bernoulli(keys[3], 0.7, lead)


def totals(head, labels, mask):
    """Of all rows, each with a weight of its own."""

    def total(hidden, weights):
        losses = head(hidden, weights, labels, mask=mask)
        rates = jnp.cos(jnp.arange(losses.size, dtype=jnp.float32))
        return jnp.sum(losses * rates.reshape(losses.shape)), losses

    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_plain_loss_and_so_are_its_derivatives(name, masked):
    """Backwards, forwards, and the second ones."""
    lead, chunk_size = SHAPES[name]
    hidden, weights, labels, mask = inputs(lead)
    mask = mask if masked else None
    chunked = functools.partial(linear_cross_entropy, chunk_size=chunk_size)
    moved = jax.tree.map(jnp.sin, (hidden, weights))

    def all_of(head):
        total = totals(head, labels, mask)
        gradient = jax.value_and_grad(total, (0, 1), has_aux=True)
        slope = lambda *at: jax.jvp(total, at, moved, has_aux=True)[1]
        return gradient(hidden, weights), jax.jvp(slope, (hidden, weights), moved)

    got, expected = (jax.jit(functools.partial(all_of, f))() for f in (chunked, plain))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_tangents_side_by_side():
    hidden, weights, labels, mask = inputs((9, 5))
    total = lambda head: lambda *at: totals(head, labels, mask)(*at)[0]
    tangents = [jax.random.normal(KEY, (4, *x.shape)) for x in (hidden, weights)]

    def slopes(head):
        push = lambda *moved: jax.jvp(total(head), (hidden, weights), moved)[1]
        return jax.vmap(push)(*tangents)

    head = functools.partial(linear_cross_entropy, chunk_size=16)
    np.testing.assert_allclose(slopes(head), slopes(plain), rtol=1e-4)


@pytest.mark.promotes("half precision: data meets weights in float32")
def test_half_precision_is_added_up_in_float32():
    hidden, weights, labels, _ = inputs((40,), width=300)
    narrow = hidden.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    losses = linear_cross_entropy(*narrow, labels, chunk_size=8)
    assert losses.dtype == jnp.float32
    exact = plain(*(x.astype(jnp.float32) for x in narrow), labels)
    np.testing.assert_allclose(losses, exact, rtol=1e-4, atol=1e-4)


def test_labels_outside_count_nothing():
    hidden, weights, _, _ = inputs((3,))
    value, grads = jax.value_and_grad(
        lambda h: linear_cross_entropy(
            h, weights, jnp.array([-1, 11, 2]), chunk_size=2
        ).sum()
    )(hidden)
    alone = lambda h: plain(h[2], weights, jnp.asarray(2))
    expected, expected_grads = jax.value_and_grad(alone)(hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-4, atol=1e-6)


def packed_head(num_classes, width):
    scale = jnp.linspace(0.001, 0.01, num_classes * width // 32, dtype=jnp.float16)
    quants = jax.random.randint(KEY, (num_classes, width // 32, 32), -127, 128)
    return lm.Packed(quants.astype(jnp.int8), scale.reshape(num_classes, -1))


def test_a_packed_head_is_the_dense_one(monkeypatch):
    # In three blocks of classes, of which the last has four in common with the one before.
    module = importlib.import_module("forwax.losses.linear_cross_entropy")
    monkeypatch.setattr(module, "CLASSES_AT_A_TIME", 5)
    hidden, _, labels, mask = inputs((5, 7), width=64)
    packed = packed_head(11, 64)
    found = []
    for head in (packed, packed.dense(jnp.float32)):
        loss = lambda h, head=head: totals(
            functools.partial(linear_cross_entropy, chunk_size=8), labels, mask
        )(h, head)
        gradient = jax.value_and_grad(loss, has_aux=True)(hidden)
        found.append(
            (gradient, jax.jvp(loss, (hidden,), (jnp.sin(hidden),), has_aux=True))
        )
    for got, wanted in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("optimised")
def test_a_packed_head_never_stands_unpacked():
    """Of SmolLM2's 108 MiB in float32, nor do the logits of 64 positions, 12 MiB."""
    spec = jax.ShapeDtypeStruct
    head = lm.Packed(spec((49152, 18, 32), jnp.int8), spec((49152, 18), jnp.float16))
    hidden = spec((128, 576), jnp.float32)
    labels = spec((128,), jnp.int32)

    def loss(hidden, head, labels):
        return linear_cross_entropy(hidden, head, labels).sum()

    def slope(hidden, head, labels):
        return jax.jvp(lambda h: loss(h, head, labels), (hidden,), (hidden,))

    for program, most in ((loss, 8), (slope, 8), (jax.grad(loss), 8)):
        run = jax.jit(program).lower(hidden, head, labels).compile()
        assert run.memory_analysis().temp_size_in_bytes <= most * 2**20


RULES = {
    "dense": fx.WeightPerturbation(num_tangents=4),
    "factors": fx.WeightPerturbation(fx.tangents.LowRank(), 4),
    "backprop": fx.Backprop(),
    "activity": fx.ActivityPerturbation(),
}


def mean_loss(head, params, x, labels):
    return jnp.mean(head(jnp.tanh(x @ params["first"]), params["head"], labels))


@pytest.mark.parametrize("name", RULES)
def test_rules_give_what_they_give_for_the_plain_loss(name):
    """The same directions; sites in a loop draw other noise, and have the head's exact error."""
    _, weights, labels, _ = inputs((24,))
    params, x = {"first": jnp.eye(6), "head": weights}, jnp.sin(jnp.arange(144.0))
    chunked = functools.partial(linear_cross_entropy, chunk_size=8)
    x = x.reshape(24, 6)
    grads = [
        jax.jit(fx.grad(functools.partial(mean_loss, head), RULES[name]))(
            KEY, params, x, labels
        )
        for head in (chunked, plain)
    ]
    leaves = ["head"] if name == "activity" else ["first", "head"]
    for leaf in leaves:
        got, want = (each[leaf] for each in grads)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


# --- memory ---

POSITIONS, CLASSES, WIDTH = 2048, 4096, 64


def temporaries(head, rule) -> float:
    """In arrays of all logits; what a program returns is not counted."""
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"first": floats(16, WIDTH), "head": floats(CLASSES, WIDTH)}
    labels = jax.ShapeDtypeStruct((POSITIONS,), jnp.int32)
    step = jax.jit(fx.value_and_grad(functools.partial(mean_loss, head), rule))
    compiled = step.lower(KEY, params, floats(POSITIONS, 16), labels).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    return held / (4 * POSITIONS * CLASSES)


@pytest.mark.parametrize("name", ["dense", "factors", "backprop"])
def test_four_tangents_take_less_than_one_array_of_logits(name):
    assert temporaries(linear_cross_entropy, RULES[name]) < 0.8
    assert temporaries(plain, RULES[name]) > 2


# --- errors ---


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size to be a positive integer, got 0"),
        ({"labels": np.ones((4, 9))}, TypeError, "class numbers, integers, got float"),
        ({"labels": np.ones(3, int)}, ValueError, r"labels of shape \(4,\), .* \(3,\)"),
        (
            {"weights": np.ones((6, 9))},
            ValueError,
            r"\[K, d\], .* \(4, 6\) and \(6, 9\)",
        ),
        ({"mask": np.ones(4)}, TypeError, "mask of booleans, got float"),
        ({"mask": np.ones(5, bool)}, ValueError, r"mask of shape \(4,\), .* \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, text):
    hidden, weights, labels, _ = inputs((4,))
    arguments = {"hidden": hidden, "weights": weights, "labels": labels, **change}
    with pytest.raises(error, match=text):
        linear_cross_entropy(**arguments)
