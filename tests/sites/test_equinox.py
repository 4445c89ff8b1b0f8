"""Equinox models, unmodified."""

import jax
import jax.numpy as jnp
import pytest

from sites.interop import KEY, Model, check, wave
from sites.programs import normal

eqx = pytest.importorskip("equinox")


def of(model, call, x, **known):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Model(lambda p, x: call(eqx.combine(p, static), x), params, (x,), **known)


def mlp():
    return of(eqx.nn.MLP(3, 2, 4, 2, key=KEY), lambda m, x: wave(m(x)), normal(0, 2, 3))


def conv():
    relu, ravel = eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jnp.ravel)
    layers = [
        eqx.nn.Conv2d(1, 2, 3, key=KEY),
        relu,
        eqx.nn.Conv2d(2, 2, 2, key=KEY),
        ravel,
        eqx.nn.Linear(8, 2, key=KEY),
    ]
    return of(eqx.nn.Sequential(layers), lambda m, x: wave(m(x)), normal(1, 2, 1, 5, 5))


def gru():
    def call(cell, xs):
        return wave(jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(3), xs)[0])

    return of(eqx.nn.GRUCell(2, 3, key=KEY), call, normal(2, 2, 3, 2), direct=False)


def attention():
    model = (eqx.nn.MultiheadAttention(2, 4, key=KEY), eqx.nn.LayerNorm(4))

    def call(model, x):
        h = jax.vmap(model[1])(x)
        return wave(model[0](h, h, h))

    return of(model, call, normal(3, 2, 3, 4))


@pytest.mark.parametrize("make", [mlp, conv, gru, attention])
def test_a_model_of_equinox(make):
    check(make())
