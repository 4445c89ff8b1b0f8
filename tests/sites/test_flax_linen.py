"""Flax Linen models, unmodified."""

import functools

import jax
import pytest

from sites.interop import KEY, Model, check, check_factors, filled, ones, wave
from sites.programs import normal

nn = pytest.importorskip("flax.linen")
pytestmark = pytest.mark.promotes("Flax mixes integers and floats")


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(nn.relu(nn.Dense(4)(x)))))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.silu(nn.LayerNorm()(nn.Dense(4)(x))))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(4)(nn.LayerNorm()(x))))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.LSTMCell(2))(x[None]))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(2, (3, 3))(x)))
        return nn.Dense(2)(nn.avg_pool(h, (2, 2), (2, 2)).reshape(x.shape[0], -1))


def of(model, x):
    return Model(
        lambda p, x: wave(model.apply(p, x)),
        filled(jax.eval_shape(model.init, KEY, x[0])),
        (x,),
    )


def convolutional(train):
    model, x = Convolutional(), normal(4, 3, 4, 4, 1)
    state = jax.eval_shape(functools.partial(model.init, train=False), KEY, x)

    def loss(params, stats, x):
        if not train:
            return wave(
                model.apply(
                    {"params": params, "batch_stats": stats}, x[None], train=False
                )
            )
        out, new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        return wave(out), new

    data = (ones(state["batch_stats"]), x)
    return Model(
        loss,
        filled(state["params"]),
        data,
        None if train else (None, None, 0),
        has_aux=train,
    )


MODELS = {
    "mlp": lambda: of(Mlp(), normal(0, 2, 3)),
    "norms": lambda: of(Normed(), normal(1, 2, 3)),
    "attention": lambda: of(Attention(), normal(2, 2, 3, 4)),
    "lstm": lambda: of(Recurrent(), normal(3, 2, 2, 2)),
    "cnn-training": lambda: convolutional(True),
    "cnn": lambda: convolutional(False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_flax_linen(name):
    check(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_the_slope_and_the_estimate_of_the_direction_in_full(name):
    check_factors(MODELS[name]())
