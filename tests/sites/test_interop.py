"""Models of Equinox and Flax, unmodified: the mean over all noise is the gradient."""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from sites.programs import Program, normal
from sites.test_unbiased import KEY, basis_mean

eqx = pytest.importorskip("equinox")
nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
EACH = (None, 0)


def wave(y):
    return jnp.sum(jnp.sin(y))


def of_equinox(model, call, x):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Program(lambda p, x: call(eqx.combine(p, static), x), params, (x,), EACH)


def equinox_mlp():
    return of_equinox(eqx.nn.MLP(3, 2, 4, 2, key=KEY), lambda m, x: wave(m(x)), normal(0, 2, 3))


def equinox_conv():
    relu, ravel = eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jnp.ravel)
    layers = [
        eqx.nn.Conv2d(1, 2, 3, key=KEY),
        relu,
        eqx.nn.Conv2d(2, 2, 2, key=KEY),
        ravel,
        eqx.nn.Linear(8, 2, key=KEY),
    ]
    return of_equinox(eqx.nn.Sequential(layers), lambda m, x: wave(m(x)), normal(1, 2, 1, 5, 5))


def equinox_gru():
    def call(cell, xs):
        return wave(jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(3), xs)[0])

    return of_equinox(eqx.nn.GRUCell(2, 3, key=KEY), call, normal(2, 2, 3, 2))


def equinox_attention():
    model = (eqx.nn.MultiheadAttention(2, 4, key=KEY), eqx.nn.LayerNorm(4))

    def call(model, x):
        h = jax.vmap(model[1])(x)
        return wave(model[0](h, h, h))

    return of_equinox(model, call, normal(3, 2, 3, 4))


class Convolutional(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.batch_norm = nnx.Conv(1, 2, (3, 3), rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.dense, self.layer_norm = nnx.Linear(8, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.readout = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, train):
        h = jax.nn.relu(self.batch_norm(self.conv(x), use_running_average=not train))
        h = nnx.max_pool(h, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return self.readout(jnp.tanh(self.layer_norm(self.dense(h))))


def nnx_convolutional(train):
    graph, params, rest = nnx.split(Convolutional(), nnx.Param, ...)

    def loss(p, x):
        model = nnx.merge(graph, p, rest, copy=True)
        return wave(model(x if train else x[None], train))

    return Program(loss, params, (normal(4, 3, 4, 4, 1),), None if train else EACH)


class Recurrent(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.LayerNorm()(linen.RNN(linen.LSTMCell(2))(x[None]))
        return linen.Dense(2)(linen.MultiHeadDotProductAttention(num_heads=1, qkv_features=2)(h, h))


def linen_recurrent():
    model, x = Recurrent(), normal(5, 2, 2, 2)
    return Program(lambda p, x: wave(model.apply(p, x)), model.init(KEY, x[0]), (x,), EACH)


MODELS = {
    "equinox-mlp": equinox_mlp,
    "equinox-conv": equinox_conv,
    "equinox-gru": equinox_gru,
    "equinox-attention": equinox_attention,
    "nnx-cnn-training": lambda: nnx_convolutional(True),
    "nnx-cnn": lambda: nnx_convolutional(False),
    "linen-lstm-attention": linen_recurrent,
}


@pytest.mark.parametrize("name", MODELS)
def test_unmodified_models_are_unbiased(name):
    program = MODELS[name]()
    with jax.numpy_rank_promotion("allow"):
        value, grads = basis_mean(program, fx.ActivityPerturbation())
        exact, truth = jax.jit(fx.value_and_grad(program.loss, fx.Backprop(), **program.options))(KEY, *program.args)
    scale = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(truth)))
    assert float(value) == pytest.approx(float(exact), rel=1e-5, abs=1e-6)
    for got, true in zip(jax.tree.leaves(grads), jax.tree.leaves(truth), strict=True):
        assert float(jnp.linalg.norm((got - true).ravel())) <= 1e-5 * float(scale)
