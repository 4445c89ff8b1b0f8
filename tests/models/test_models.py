"""The models: shapes, sizes, initialisation, and what they compute, against plain NumPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forwax.models import MLP, Conv, ConvNet, Dense, logistic_regression
from forwax.models.layers import max_pool

KEY = jax.random.key(0)


def num_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model))


CONV_NET = functools.partial(ConvNet, (28, 28, 1), 10, key=KEY)
SMALL_CONV_NET = functools.partial(
    ConvNet, (17, 16, 1), 4, channels=2, dense=3, key=KEY
)


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: logistic_regression(784, 10, key=KEY), (28, 28, 1), 7_850),
        (lambda: MLP(784, (1024, 1024), 10, key=KEY), (28, 28, 1), 1_863_690),
        (CONV_NET, (28, 28, 1), 1_171_274),
        (lambda: ConvNet((32, 32, 3), 10, key=KEY), (32, 32, 3), 1_762_250),
        (SMALL_CONV_NET, (17, 16, 1), 20 + 3 * 38 + 9 + 16),
    ],
)
def test_sizes(make, shape, expected):
    classes = 4 if shape == (17, 16, 1) else 10
    model = eqx.filter_eval_shape(make)
    assert num_parameters(model) == expected
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert eqx.filter_eval_shape(lambda model, x: model(x), model, image).shape == (
        classes,
    )


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [
        (lambda: Dense(400, 300, key=KEY).weight, 400),
        (lambda: Conv(16, 64, size=3, key=KEY).weight, 144),
        (lambda: MLP(100, (500,), 10, key=KEY).layers[0].weight, 100),
        (lambda: CONV_NET().convs[2].weight, 576),
        (lambda: CONV_NET().hidden.weight, 1024),
    ],
)
def test_weights_have_the_variance_of_he(make, fan_in):
    weight = jax.jit(make)()
    # the relative deviation of a variance estimate is sqrt(2 / size)
    assert float(weight.var()) * fan_in / 2 == pytest.approx(
        1, abs=5 * (2 / weight.size) ** 0.5
    )
    assert abs(float(weight.mean())) < 5 * (2 / fan_in / weight.size) ** 0.5


def test_keys_make_different_layers_and_the_same_key_the_same_model():
    first, again = MLP(8, (8,), 8, key=KEY), MLP(8, (8,), 8, key=KEY)
    assert not np.array_equal(first.layers[0].weight, first.layers[1].weight)
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))


def test_mlp_is_dense_relu_dense():
    model = MLP(6, (5, 4), 3, key=KEY)
    x = np.linspace(-1, 1, 6)
    h = x
    for i, layer in enumerate(model.layers):
        h = np.asarray(layer.weight, np.float64) @ h + np.asarray(layer.bias)
        h = np.maximum(h, 0) if i < 2 else h
    np.testing.assert_allclose(
        model(jnp.asarray(x, jnp.float32).reshape(2, 3)), h, rtol=1e-5, atol=1e-6
    )


def test_conv_sums_its_windows():
    layer = Conv(2, 3, size=3, key=KEY)
    x = np.asarray(jax.random.normal(jax.random.key(1), (5, 6, 2)), np.float64)
    weight = np.asarray(layer.weight, np.float64)
    expected = [
        [np.einsum("hwc,hwco->o", x[i : i + 3, j : j + 3], weight) for j in range(4)]
        for i in range(3)
    ]
    np.testing.assert_allclose(
        layer(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5
    )


def test_max_pool_cuts_an_odd_border():
    x = jnp.arange(15.0).reshape(3, 5, 1)
    assert max_pool(x)[..., 0].tolist() == [[6.0, 8.0]]


def test_half_precision_stays_half():
    def features(x):
        model = ConvNet((16, 16, 1), 2, channels=2, dense=3, key=KEY)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)(x)

    image = jax.ShapeDtypeStruct((16, 16, 1), jnp.bfloat16)
    assert jax.eval_shape(features, image).dtype == jnp.bfloat16


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match=r"every size of an MLP must be at least 1, got \(4, 0, 2\)"
    ):
        MLP(4, (0,), 2, key=KEY)
    with pytest.raises(
        ValueError, match="ConvNet needs images of at least 16×16, got 15×28"
    ):
        ConvNet((15, 28, 1), 10, key=KEY)
