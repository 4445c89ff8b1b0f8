"""Equinox models, unmodified."""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from sites.interop import KEY, Model, check, check_factors, filled, wave
from sites.programs import normal

eqx = pytest.importorskip("equinox")


def of(make, call, x, **known):
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )
    params = filled(shapes)
    return Model(lambda p, x: call(eqx.combine(p, static), x), params, (x,), **known)


def mlp():
    return of(
        lambda: eqx.nn.MLP(3, 2, 4, 2, key=KEY),
        lambda m, x: wave(m(x)),
        normal(0, 2, 3),
    )


def conv():
    def make():
        relu, ravel = eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jnp.ravel)
        convolutions = [
            eqx.nn.Conv2d(1, 2, 3, key=KEY),
            relu,
            eqx.nn.Conv2d(2, 2, 2, key=KEY),
        ]
        return eqx.nn.Sequential([*convolutions, ravel, eqx.nn.Linear(8, 2, key=KEY)])

    return of(make, lambda m, x: wave(m(x)), normal(1, 2, 1, 5, 5))


def gru():
    def call(cell, xs):
        return wave(jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(3), xs)[0])

    return of(
        lambda: eqx.nn.GRUCell(2, 3, key=KEY), call, normal(2, 2, 3, 2), direct=False
    )


def attention():
    def make():
        return eqx.nn.MultiheadAttention(2, 4, key=KEY), eqx.nn.LayerNorm(4)

    def call(model, x):
        h = jax.vmap(model[1])(x)
        return wave(model[0](h, h, h))

    return of(make, call, normal(3, 2, 3, 4))


MODELS = {"mlp": mlp, "conv": conv, "gru": gru, "attention": attention}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_equinox(name):
    check(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_factors_give_the_slope_and_the_estimate_of_the_direction_in_full(name):
    check_factors(MODELS[name]())


def test_explain_names_parameters_by_path_and_the_users_own_line():
    """Not broadcasts, and not the library's file: GroupNorm's gains are its 4."""
    keys = jax.random.split(jax.random.key(0), 2)
    layers = {"conv": eqx.nn.Conv2d(1, 4, 3, key=keys[0])}
    layers |= {
        "norm": eqx.nn.GroupNorm(2, 4),
        "head": eqx.nn.Linear(16, 2, key=keys[1]),
    }
    params, static = eqx.partition(layers, eqx.is_inexact_array)

    def loss(params, x):
        parts = eqx.combine(params, static)
        h = parts["norm"](parts["conv"](x))
        return jnp.sum(parts["head"](h.reshape(-1)))

    table = fx.explain(loss, in_axes=(None, 0))(params, jnp.ones((3, 1, 4, 4)))
    paths = [path for row in table.rows for path in row.parameters]
    assert sorted(paths) == [
        "conv.bias",
        "conv.weight",
        "head.bias",
        "head.weight",
        "norm.bias",
        "norm.weight",
    ]
    assert sum(row.weight_noise for row in table.rows) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    assert all(f"{__file__}:" in row.where for row in table.rows)
    assert "conv.weight" in str(table)
