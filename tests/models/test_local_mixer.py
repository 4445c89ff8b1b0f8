"""The LocalMixer: the paper's sizes, its architecture against plain NumPy, options and refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forwax.models import LocalMixer
from forwax.models.layers import standardize
from forwax.models.local_mixer import SIZES, noisy_relu

KEY = jax.random.key(0)
TINY = {"blocks": 2, "patches": 2, "channels": 8, "groups": 2}


def shapes_of(*args, **kwargs):
    return eqx.filter_eval_shape(LocalMixer.named, *args, key=KEY, **kwargs)


def num_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize(
    ("name", "expected", "losses"),
    [
        ("S/1/1", 271_892, 1),
        ("M/1/16", 429_076, 16),
        ("S/4/8", 49_710, 256),
        ("M/8/16", 918_770, 4_096),
        ("L/8/64", 13_074_674, 16_384),
        ("L/32/64", 16_311_296 + 5 * 2_049_000, 262_144),
    ],
)
def test_sizes_are_the_papers(name, expected, losses):
    model = shapes_of(name)
    assert num_parameters(model) == expected
    image = jax.ShapeDtypeStruct(SIZES[name].in_shape, jnp.float32)
    features = eqx.filter_eval_shape(lambda model, x: model.features(x), model, image)
    assert sum(h.shape[0] * h.shape[1] for h in features) == losses


def test_projectors_take_the_place_of_the_classifiers():
    model = shapes_of("M/8/16", projection=128)
    assert [head.weight.shape for head in model.heads] == [(512, 128)] * 4
    assert model.readout.weight.shape == (512, 10)


def normalized(x, axis, epsilon=0.01):
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(
        x.var(axis, keepdims=True) + epsilon
    )


def by_hand(model, image, token_axes, group_axes, mix):
    """The features in NumPy; `mix` is the token mixing."""
    rows = [image[i : i + 3, j : j + 2].ravel() for i in (0, 3) for j in (0, 2)]
    x, features = np.stack(rows), []
    for block in jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.blocks):
        h = x.reshape(4, -1)
        if block.mixing is not None:
            h = np.maximum(
                normalized(mix(block.mixing, normalized(h, token_axes)), token_axes), 0
            )
        h = normalized(h, token_axes) @ block.dense.weight + block.dense.bias
        h = np.maximum(normalized(h, token_axes), 0).reshape(4, 2, 4)
        h = (
            np.einsum("pgc,gcd->pgd", normalized(h, group_axes), block.groups.weight)
            + block.groups.bias
        )
        h = normalized(h, group_axes) + (0 if block.mixing is None else x)
        x = np.maximum(h, 0)
        features.append(x)
    return features


def dense(mixing, h):
    return mixing.weight @ h + mixing.bias[:, None]


def depthwise(mixing, h):
    padded = np.pad(h.reshape(2, 2, -1), ((1, 1), (1, 1), (0, 0)))
    windows = [
        [
            (padded[i : i + 3, j : j + 3] * mixing.weight[:, :, 0]).sum((0, 1))
            for j in (0, 1)
        ]
        for i in (0, 1)
    ]
    return np.array(windows).reshape(4, -1) + mixing.bias


@pytest.mark.parametrize(
    ("options", "token_axes", "group_axes", "mix"),
    [
        ({}, 1, 2, dense),
        ({"normalize": "channels"}, 1, (1, 2), dense),
        ({"normalize": "space", "mixing": "depthwise"}, (0, 1), (0, 1, 2), depthwise),
    ],
)
def test_the_architecture_is_the_papers(options, token_axes, group_axes, mix):
    model = LocalMixer((6, 4, 3), 5, **TINY, **options, key=KEY)
    leaves, structure = jax.tree.flatten(model)  # biases away from zero
    random = np.random.default_rng(0)
    model = structure.unflatten(
        [leaf + random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )
    image = random.normal(size=(6, 4, 3))
    logits, features = jax.jit(lambda model, x: (model(x), model.features(x)))(
        model, jnp.asarray(image, jnp.float32)
    )
    expected = by_hand(model, image, token_axes, group_axes, mix)
    for mine, true in zip(features, expected, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-3, atol=1e-4)
    pooled = expected[-1].mean(0).ravel()
    np.testing.assert_allclose(
        logits,
        pooled @ np.asarray(model.readout.weight) + model.readout.bias,
        atol=1e-3,
    )


def test_stop_gradients_cut_each_block_from_the_next():
    model, x = (
        LocalMixer((4, 4, 1), 5, **TINY, key=KEY),
        jnp.linspace(-1, 1, 16).reshape(4, 4, 1),
    )

    def last(model, stop):
        return jnp.sum(model.features(x, stop_gradients=stop)[-1] ** 3)

    both = jax.jit(
        lambda model: (jax.grad(last)(model, True), jax.grad(last)(model, False))
    )
    cut, whole = both(model)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cut.blocks[0]))
    assert np.any(whole.blocks[0].dense.weight)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for mine, same in zip(
        jax.tree.leaves(cut.blocks[1]), jax.tree.leaves(whole.blocks[1]), strict=True
    ):
        np.testing.assert_allclose(mine, same, atol=1e-6 * size, rtol=1e-5)


def test_the_slope_of_a_dead_group_is_bounded():
    slopes = jax.jacobian(lambda x: standardize(x, (0,), 0.01))(jnp.zeros(4))
    assert float(jnp.abs(slopes).max()) <= 10
    assert float(standardize(jnp.array([0.0, 3.0]), (0,), 0.01)[1]) == pytest.approx(
        1, abs=0.01
    )


def test_the_relu_with_a_noise_point_is_the_relu():
    z = jnp.array([-1.0, 0.0, 2.0])
    assert noisy_relu(z).tolist() == [0, 0, 2]
    assert jax.grad(lambda z: noisy_relu(z).sum())(z).tolist() == [0, 0, 1]


def test_half_precision_stays_half():
    model = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16),
        LocalMixer((4, 4, 1), 5, **TINY, key=KEY),
    )
    features = jax.eval_shape(model.features, jnp.ones((4, 4, 1), jnp.bfloat16))
    assert {h.dtype for h in features} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"blocks": 0},
            "expected counts of at least 1, got blocks=0, patches=2, channels=8, groups=2",
        ),
        ({"patches": 3}, "an image of 4×4 cannot be cut into 3×3 patches"),
        ({"groups": 3}, "8 channels cannot be cut into 3 groups"),
        (
            {"mixing": "conv"},
            'expected mixing to be "dense" or "depthwise", got \'conv\'',
        ),
        (
            {"normalize": "batch"},
            'expected normalize to be "channels", "group" or "space", got \'batch\'',
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LocalMixer((4, 4, 1), 5, **(TINY | options), key=KEY)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError,
        match="expected one of S/1/1, M/1/16, S/4/8, M/8/16, L/8/64, L/32/64, got 'XL'",
    ):
        LocalMixer.named("XL", key=KEY)
