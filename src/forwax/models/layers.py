"""The two layers that hold parameters, with He initialisation (He et al. 2015, arXiv 1502.01852)."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp


def he_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Draw normal weights of variance 2 / fan_in, which keeps a ReLU layer's activations at the same scale.

    Args:
        key: a JAX random key.
        shape: the shape of the weights.
        fan_in: how many inputs each output sums.

    Returns:
        Weights of the given shape in the default floating type.

    >>> he_normal(jax.random.key(0), (10, 4), fan_in=4).shape
    (10, 4)
    """
    return jax.random.normal(key, shape) * math.sqrt(2 / fan_in)


class Dense(eqx.Module):
    """A dense layer z = W x + b of one example, with W of shape (out, in) and b zero at the start.

    >>> layer = Dense(4, 10, key=jax.random.key(0))
    >>> layer(jnp.ones(4)).shape
    (10,)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, in_size: int, out_size: int, *, key: jax.Array):
        self.weight = he_normal(key, (out_size, in_size), in_size)
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x of shape (in,) to z of shape (out,)."""
        return self.weight @ x + self.bias


class Conv(eqx.Module):
    """A square convolution without padding: (height, width, in) to (height - size + 1, width - size + 1, out).

    Channels come last, which is the layout that XLA's convolutions are fastest with on a CPU.

    >>> layer = Conv(3, 64, size=3, key=jax.random.key(0))
    >>> layer(jnp.ones((32, 32, 3))).shape
    (30, 30, 64)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, in_channels: int, out_channels: int, *, size: int, key: jax.Array):
        self.weight = he_normal(key, (size, size, in_channels, out_channels), size * size * in_channels)
        self.bias = jnp.zeros(out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve one example of shape (height, width, in)."""
        z = jax.lax.conv_general_dilated(
            x[None], self.weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return z[0] + self.bias[None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """Take the largest of each 2×2 square of one example (height, width, channels); an odd last row or column is cut.

    >>> max_pool(jnp.arange(16.0).reshape(4, 4, 1))[..., 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    height, width, channels = x.shape[0] // 2, x.shape[1] // 2, x.shape[2]
    squares = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2, channels)
    return squares.max(axis=(1, 3))
