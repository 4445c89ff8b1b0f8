"""The networks of the cost benchmark: a loss of (params, *data), its parameters and its data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from activity import transformer, transformer_params
from forwax.models import ConvNet
from step_time import WIDTHS, loss, mlp

KEY = jax.random.key(0)


class Scenario(NamedTuple):
    """A loss and what it is called with; arrays, or their shapes where it is compiled only."""

    loss: Callable[..., Array]
    params: Any
    data: tuple[Any, ...]


def perceptron(batch: int) -> Scenario:
    """The MLP 784-1024-1024-10."""
    x, y = (
        jax.random.normal(KEY, (batch, WIDTHS[0])),
        jax.random.randint(KEY, (batch,), 0, WIDTHS[-1]),
    )
    return Scenario(loss, mlp(KEY), (x, y))


def deep_loss(params: list[tuple[Array, Array]], x: Array) -> Array:
    for weight, bias in params:
        x = jax.nn.relu(x @ weight + bias)
    return jnp.mean(x**2)


def deep(depth: int, batch: int, width: int = 1024) -> Scenario:
    """Layers of one width."""
    keys = jax.random.split(KEY, depth)
    params = [
        (jax.random.normal(k, (width, width)) * np.sqrt(2 / width), jnp.zeros(width))
        for k in keys
    ]
    return Scenario(deep_loss, params, (jax.random.normal(KEY, (batch, width)),))


def convolutional(batch: int) -> Scenario:
    """The convolutional network of Baydin et al. 2022 on 28×28 images."""
    arrays, structure = eqx.partition(
        ConvNet((28, 28, 1), 10, key=KEY), eqx.is_inexact_array
    )

    def mean_loss(arrays: Any, x: Array, y: Array) -> Array:
        logits = jax.vmap(eqx.combine(arrays, structure))(x)
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        )

    data = (
        jax.random.normal(KEY, (batch, 28, 28, 1)),
        jax.random.randint(KEY, (batch,), 0, 10),
    )
    return Scenario(mean_loss, arrays, data)


def language_model(layers: int, batch: int, length: int, width: int) -> Scenario:
    """A transformer in plain JAX, a Python loop over its layers."""

    def initial(spec: jax.ShapeDtypeStruct) -> Array:
        fan_in = spec.shape[-2] if len(spec.shape) > 1 else 1
        return (
            jnp.ones(spec.shape)
            if spec.shape[0] == 2 or fan_in == 1
            else jax.random.normal(KEY, spec.shape) * 0.02
        )

    def mean_loss(params: Any, tokens: Array) -> Array:
        return jnp.mean(jax.vmap(functools.partial(transformer, params))(tokens))

    params = jax.tree.map(initial, transformer_params(layers, width))
    return Scenario(
        mean_loss, params, (jax.random.randint(KEY, (batch, length), 0, 256),)
    )


def spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def recurrent(length: int, width: int = 128, batch: int = 1024) -> Scenario:
    """A tanh-RNN by `scan` over a sequence; shapes only."""

    def mean_loss(params: Any, x: Array) -> Array:
        w, u, b = params
        step = lambda h, x: (jnp.tanh(h @ w + x @ u + b), None)  # noqa: E731
        return jnp.mean(lax.scan(step, jnp.zeros(x.shape[1:2] + b.shape), x)[0] ** 2)

    return Scenario(
        mean_loss,
        (spec(width, width), spec(8, width), spec(width)),
        (spec(length, batch, 8),),
    )


def stacked(depth: int, width: int = 128, batch: int = 1024) -> Scenario:
    """An MLP by `scan` over its layers; shapes only."""

    def mean_loss(params: Any, x: Array) -> Array:
        step = lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None)  # noqa: E731
        return jnp.mean(lax.scan(step, x, params)[0] ** 2)

    return Scenario(
        mean_loss,
        (spec(depth, width, width), spec(depth, width)),
        (spec(batch, width),),
    )
