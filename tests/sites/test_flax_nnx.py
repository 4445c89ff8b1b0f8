"""Flax NNX models, unmodified."""

import jax.numpy as jnp
import pytest

from sites.interop import Model, check, check_factors, filled, ones, wave
from sites.programs import normal

nnx = pytest.importorskip("flax.nnx")
pytestmark = pytest.mark.promotes("Flax mixes integers and floats")


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(i, o, rngs=rngs) for i, o in [(3, 4), (4, 4), (4, 2)]]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.scale, self.readout = (
            nnx.RMSNorm(4, rngs=rngs),
            nnx.Linear(4, 2, rngs=rngs),
        )

    def __call__(self, x):
        return self.readout(self.scale(nnx.gelu(self.norm(self.dense(x)))))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.norm = nnx.Embed(5, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens)
        h = h + self.attention(self.norm(h), mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(h)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.readout = (
            nnx.RNN(nnx.LSTMCell(2, 2, rngs=rngs)),
            nnx.Linear(2, 2, rngs=rngs),
        )

    def __call__(self, x):
        return self.readout(self.rnn(x[None])[0])


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = (
            nnx.Conv(1, 2, (3, 3), rngs=rngs),
            nnx.BatchNorm(2, rngs=rngs),
        )
        self.dense = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x, train):
        h = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.dense(nnx.max_pool(h, (2, 2), (2, 2)).reshape(x.shape[0], -1))


def of(kind, x):
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: kind(nnx.Rngs(0))), nnx.Param, ...
    )
    params, rest = filled(params), filled(rest)
    return Model(
        lambda p, x: wave(nnx.merge(graph, p, rest, copy=True)(x)), params, (x,)
    )


def convolutional(train):
    graph, params, stats = nnx.split(
        nnx.eval_shape(lambda: Convolutional(nnx.Rngs(0))), nnx.Param, ...
    )
    params, stats = filled(params), ones(stats)

    def loss(p, x):
        model = nnx.merge(graph, p, stats, copy=True)
        value = wave(model(x if train else x[None], train))
        return (value, nnx.state(model, nnx.BatchStat)) if train else value

    x = normal(4, 3, 4, 4, 1)
    return (
        Model(loss, params, (x,), None, has_aux=True)
        if train
        else Model(loss, params, (x,))
    )


MODELS = {
    "mlp": lambda: of(Mlp, normal(0, 2, 3)),
    "norms": lambda: of(Normed, normal(1, 2, 3)),
    "attention": lambda: of(Attention, jnp.array([[0, 3, 1], [2, 2, 4]])),
    "lstm": lambda: of(Recurrent, normal(3, 2, 3, 2)),
    "cnn-training": lambda: convolutional(True),
    "cnn": lambda: convolutional(False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_flax_nnx(name):
    check(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_the_slope_and_the_estimate_of_the_direction_in_full(name):
    check_factors(MODELS[name]())
