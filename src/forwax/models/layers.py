"""Layers, and the He initialisation of their parameters (He et al. 2015, arXiv 1502.01852)."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from forwax._tree import promoted


def he_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Draw normal weights of variance 2 / fan_in, which keeps activations of ReLUs at one scale.

    Args:
        key: a JAX random key.
        shape: the shape of the weights.
        fan_in: how many inputs each output sums.

    Returns:
        Weights of the given shape in the default floating type.

    >>> he_normal(jax.random.key(0), (10, 4), fan_in=4).shape
    (10, 4)
    """
    # The same numbers as in four axes, which XLA takes a dozen times as long to compile.
    flat = jax.random.normal(key, (math.prod(shape),))
    return flat.reshape(shape) * math.sqrt(2 / fan_in)


class Dense(eqx.Module):
    """A dense layer z = W x + b of one example, with W of shape (out, in) and b zero at the start.

    >>> layer = Dense(4, 10, key=jax.random.key(0))
    >>> layer(jnp.ones(4)).shape
    (10,)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, in_size: int, out_size: int, *, key: jax.Array):
        self.weight = he_normal(key, (out_size, in_size), fan_in=in_size)
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x of shape (in,) to z of shape (out,)."""
        return self.weight @ x + self.bias


class Conv(eqx.Module):
    """A square convolution without padding.

    It takes (height, width, in) to (height - size + 1, width - size + 1, out). Channels come last,
    which is the layout that XLA's convolutions are fastest with on a CPU.

    >>> layer = Conv(3, 64, size=3, key=jax.random.key(0))
    >>> layer(jnp.ones((32, 32, 3))).shape
    (30, 30, 64)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(
        self, in_channels: int, out_channels: int, *, size: int, key: jax.Array
    ):
        shape = (size, size, in_channels, out_channels)
        self.weight = he_normal(key, shape, fan_in=size * size * in_channels)
        self.bias = jnp.zeros(out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve one example of shape (height, width, in)."""
        z = jax.lax.conv_general_dilated(
            x[None],
            self.weight,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return z[0] + self.bias[None, None]


def max_pool(x: jax.Array) -> jax.Array:
    """Take the largest of each 2×2 square of one example (height, width, channels).

    An odd last row or column is cut.

    >>> max_pool(jnp.arange(16.0).reshape(4, 4, 1))[..., 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    rows, columns, channels = x.shape
    height = rows // 2
    width = columns // 2
    even = x[: 2 * height, : 2 * width]
    squares = even.reshape(height, 2, width, 2, channels)
    return squares.max(axis=(1, 3))


class ChannelDense(eqx.Module):
    """A dense layer over the last axis, z = x W + b, with W of shape (in, out).

    >>> layer = ChannelDense(4, 10, key=jax.random.key(0))
    >>> layer(jnp.ones((7, 4))).shape
    (7, 10)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, in_size: int, out_size: int, *, key: jax.Array):
        self.weight = he_normal(key, (in_size, out_size), fan_in=in_size)
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x of shape (..., in) to z of shape (..., out)."""
        z = x @ self.weight
        leading = tuple(range(z.ndim - 1))
        return z + jnp.expand_dims(self.bias, leading)


class TokenDense(eqx.Module):
    """A dense layer over tokens: z[q, c] = Σ_p W[q, p] x[p, c] + b[q], the same for all channels.

    >>> layer = TokenDense(16, key=jax.random.key(0))
    >>> layer(jnp.ones((16, 3))).shape
    (16, 3)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, tokens: int, *, key: jax.Array):
        self.weight = he_normal(key, (tokens, tokens), fan_in=tokens)
        self.bias = jnp.zeros(tokens)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mix the tokens of x of shape (tokens, channels)."""
        return self.weight @ x + self.bias[:, None]


class DepthwiseConv(eqx.Module):
    """A depthwise convolution over the square that tokens form, zero-padded to keep their number.

    >>> layer = DepthwiseConv(5, size=3, key=jax.random.key(0))
    >>> layer(jnp.ones((16, 5))).shape
    (16, 5)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, channels: int, *, size: int, key: jax.Array):
        self.weight = he_normal(key, (size, size, 1, channels), fan_in=size * size)
        self.bias = jnp.zeros(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve the tokens of x of shape (side², channels)."""
        tokens, channels = x.shape
        side = math.isqrt(tokens)
        z = jax.lax.conv_general_dilated(
            x.reshape(1, side, side, channels),
            self.weight,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )
        return z.reshape(tokens, channels) + self.bias[None]


class GroupedDense(eqx.Module):
    """A dense layer in each group of channels: z[p, g, d] = Σ_c x[p, g, c] W[g, c, d] + b[g, d].

    >>> layer = GroupedDense(2, 8, key=jax.random.key(0))
    >>> layer(jnp.ones((16, 2, 8))).shape
    (16, 2, 8)
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, groups: int, size: int, *, key: jax.Array):
        self.weight = he_normal(key, (groups, size, size), fan_in=size)
        self.bias = jnp.zeros((groups, size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x of shape (tokens, groups, size) to z of the same shape."""
        return jnp.einsum("pgc,gcd->pgd", x, self.weight) + self.bias[None]


def standardize(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    """Normalise to mean 0 and variance 1 over some axes: (x - mean) / √(variance + epsilon).

    There are no learnt parameters. Its slope is at most 1/√epsilon, also where x is constant.

    >>> standardize(jnp.array([1.0, 3.0]), (0,), 0.0).tolist()
    [-1.0, 1.0]
    """
    wide = x.astype(promoted(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
    variance = jnp.mean(centred**2, axis=axes, keepdims=True)
    standard = centred * jax.lax.rsqrt(variance + epsilon)
    return standard.astype(x.dtype)
