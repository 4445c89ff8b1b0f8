"""A small Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

from forwax.models.layers import Dense
from forwax.models.local_mixer import patchify


class TransformerBlock(eqx.Module):
    """Self-attention, then a dense layer of each token with a GELU.

    Each is normalised before, and added to its input.

    >>> block = TransformerBlock(8, heads=2, key=jax.random.key(0))
    >>> block(jnp.ones((4, 8))).shape
    (4, 8)
    """

    before_attention: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    before_dense: eqx.nn.LayerNorm
    wide: eqx.nn.Linear
    narrow: eqx.nn.Linear

    def __init__(
        self, channels: int, *, heads: int, expansion: int = 4, key: jax.Array
    ):
        first, second, third = jax.random.split(key, 3)
        self.before_attention = eqx.nn.LayerNorm(channels)
        self.attention = eqx.nn.MultiheadAttention(heads, channels, key=first)
        self.before_dense = eqx.nn.LayerNorm(channels)
        self.wide = eqx.nn.Linear(channels, expansion * channels, key=second)
        self.narrow = eqx.nn.Linear(expansion * channels, channels, key=third)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens of shape (tokens, channels) to tokens of the same shape."""
        h = jax.vmap(self.before_attention)(x)
        x = x + self.attention(h, h, h)
        h = jax.vmap(self.before_dense)(x)
        h = jax.nn.gelu(jax.vmap(self.wide)(h))
        return x + jax.vmap(self.narrow)(h)


class PatchEmbedding(eqx.Module):
    """Patches of an image, each mapped to a token, with a learnt position for each.

    >>> embedding = PatchEmbedding((8, 8, 1), patches=2, channels=6, key=jax.random.key(0))
    >>> embedding(jnp.ones((8, 8, 1))).shape
    (4, 6)
    """

    dense: Dense
    positions: jax.Array
    patches: int = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        *,
        patches: int,
        channels: int,
        key: jax.Array,
    ):
        height, width, in_channels = in_shape
        if height % patches or width % patches:
            raise ValueError(
                f"PatchEmbedding: an image of {height}×{width} cannot be cut into "
                f"{patches}×{patches} patches."
            )
        first, second = jax.random.split(key)
        size = height // patches * (width // patches) * in_channels
        self.dense = Dense(size, channels, key=first)
        self.positions = 0.02 * jax.random.normal(second, (patches**2, channels))
        self.patches = patches

    def __call__(self, image: jax.Array) -> jax.Array:
        """Give the tokens, shape (patches², channels), of an image (height, width, channels)."""
        return jax.vmap(self.dense)(patchify(image, self.patches)) + self.positions


class VisionTransformer(eqx.Module):
    """Patch tokens, transformer blocks, the mean over tokens, and a linear readout.

    Args:
        in_shape: (height, width, channels) of one example.
        out_size: how many logits come out.
        blocks: how many transformer blocks there are.
        patches: the number of patches along each side of the image.
        channels: of each token.
        heads: of the attention.
        key: a JAX random key.

    Raises:
        ValueError: when an image cannot be cut into so many patches.

    >>> shape = dict(blocks=2, patches=4, channels=16, heads=2)
    >>> model = VisionTransformer((28, 28, 1), 10, **shape, key=jax.random.key(0))
    >>> jax.eval_shape(model, jnp.ones((28, 28, 1))).shape
    (10,)
    """

    embedding: PatchEmbedding
    blocks: tuple[TransformerBlock, ...]
    norm: eqx.nn.LayerNorm
    out: Dense

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_size: int,
        *,
        blocks: int = 4,
        patches: int = 4,
        channels: int = 64,
        heads: int = 4,
        key: jax.Array,
    ):
        first, last, *keys = jax.random.split(key, blocks + 2)
        self.embedding = PatchEmbedding(
            in_shape, patches=patches, channels=channels, key=first
        )
        self.blocks = tuple(
            TransformerBlock(channels, heads=heads, key=each) for each in keys
        )
        self.norm = eqx.nn.LayerNorm(channels)
        self.out = Dense(channels, out_size, key=last)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the logits, shape (out,), of one example of shape (height, width, channels)."""
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        h = jax.vmap(self.norm)(h)
        return self.out(jnp.mean(h, axis=0))
