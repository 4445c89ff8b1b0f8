"""The multi-layer perceptron, and its case without a hidden layer: logistic regression."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from forwax.models.layers import Dense


class MLP(eqx.Module):
    """Dense layers with ReLU between them; one example of any shape in, one vector of logits out.

    The MLP of Baydin et al. 2022 (arXiv 2202.08587) is `MLP(784, (1024, 1024), 10, key=key)`.
    Without widths it is logistic regression.

    Args:
        in_size: how many numbers one example holds; it is flattened.
        widths: the widths of the hidden layers, first to last.
        out_size: how many logits come out.
        key: a JAX random key for the He-normal weights; biases start at zero.

    Raises:
        ValueError: when a size is below one.

    >>> model = MLP(64, (32,), 10, key=jax.random.key(0))
    >>> model(jnp.ones((8, 8))).shape
    (10,)
    >>> jax.vmap(model)(jnp.ones((5, 8, 8))).shape
    (5, 10)
    """

    layers: tuple[Dense, ...]

    def __init__(
        self, in_size: int, widths: Sequence[int], out_size: int, *, key: jax.Array
    ):
        sizes = (in_size, *widths, out_size)
        if min(sizes) < 1:
            raise ValueError(f"every size of an MLP must be at least 1, got {sizes}")
        keys = jax.random.split(key, len(sizes) - 1)
        layers: list[Dense] = []
        for layer_key, before, after in zip(keys, sizes[:-1], sizes[1:], strict=True):
            layers.append(Dense(before, after, key=layer_key))
        self.layers = tuple(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the logits, shape (out,), of one example."""
        h = jnp.ravel(x)
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h))
        return self.layers[-1](h)


def logistic_regression(in_size: int, out_size: int, *, key: jax.Array) -> MLP:
    """Build logistic regression: one dense layer from the flattened example to the logits.

    Args:
        in_size: how many numbers one example holds.
        out_size: how many classes there are.
        key: a JAX random key.

    >>> model = logistic_regression(784, 10, key=jax.random.key(0))
    >>> model(jnp.zeros((28, 28, 1))).shape
    (10,)
    """
    return MLP(in_size, (), out_size, key=key)
