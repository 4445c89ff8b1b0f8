"""The convolutional network of Baydin et al. 2022 (arXiv 2202.08587)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

from forwax.models.layers import Conv, Dense, max_pool


class ConvNet(eqx.Module):
    """Four 3×3 convolutions of 64 channels, a dense layer of 1024, and ReLU after each.

    Behind the second and the fourth comes 2×2 max-pooling. The paper gives these layers; it does
    not say how the borders are treated, so there is no padding here.

    Args:
        in_shape: (height, width, channels) of one example; 28×28 and 32×32 images both fit.
        out_size: how many logits come out.
        channels: the width of the convolutions.
        dense: the width of the hidden dense layer.
        key: a JAX random key for the He-normal weights; biases start at zero.

    Raises:
        ValueError: when the image is too small for four convolutions and two poolings.

    >>> model = ConvNet((28, 28, 1), 10, key=jax.random.key(0))
    >>> model(jnp.ones((28, 28, 1))).shape
    (10,)
    >>> sum(leaf.size for leaf in jax.tree.leaves(model))
    1171274
    """

    convs: tuple[Conv, ...]
    hidden: Dense
    out: Dense

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_size: int,
        *,
        channels: int = 64,
        dense: int = 1024,
        key: jax.Array,
    ):
        height, width, in_channels = in_shape
        rows = _pooled(height)
        columns = _pooled(width)
        if min(rows, columns) < 1:
            raise ValueError(
                f"ConvNet needs images of at least 16×16, got {height}×{width}"
            )
        keys = jax.random.split(key, 6)
        widths = (in_channels, channels, channels, channels)
        pairs = zip(widths, keys[:4], strict=True)
        self.convs = tuple(
            Conv(width, channels, size=3, key=each) for width, each in pairs
        )
        self.hidden = Dense(rows * columns * channels, dense, key=keys[4])
        self.out = Dense(dense, out_size, key=keys[5])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the logits, shape (out,), of one example of shape (height, width, channels)."""
        first, second, third, fourth = self.convs
        h = jax.nn.relu(first(x))
        h = jax.nn.relu(second(h))
        h = max_pool(h)
        h = jax.nn.relu(third(h))
        h = jax.nn.relu(fourth(h))
        h = max_pool(h)
        h = jax.nn.relu(self.hidden(jnp.ravel(h)))
        return self.out(h)


def _pooled(side: int) -> int:
    """What is left of a side: each pair of convolutions cuts 4 rows, and each pooling halves."""
    halved = (side - 4) // 2
    return (halved - 4) // 2
