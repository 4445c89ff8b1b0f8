"""Local heads for any sequence of blocks: a loss for each block, patch and group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from forwax.models.layers import ChannelDense
from forwax.models.local_losses import pooled


class Local(eqx.Module):
    """A sequence of blocks with a linear head for each and a linear readout.

    `forwax.models.local` builds it.

    Attributes:
        blocks: each takes what the one before returns.
        heads: for each block, on its averaged features.
        readout: the classifier, on the last block's averaged features.
        groups: how many groups each block's channels are cut into.
        channel_axis: which axis of a block's output counts channels; the others count patches.
    """

    blocks: tuple[Callable[[Any], Any], ...]
    heads: tuple[ChannelDense, ...]
    readout: ChannelDense
    groups: tuple[int, ...] = eqx.field(static=True)
    channel_axis: int = eqx.field(static=True)

    def features(
        self, x: Any, *, stop_gradients: bool = False
    ) -> tuple[jax.Array, ...]:
        """Each block's features [P, G, C] of one example; `stop_gradients` cuts between blocks."""
        features: list[jax.Array] = []
        h = x
        for block, groups in zip(self.blocks, self.groups, strict=True):
            h = block(jax.lax.stop_gradient(h) if stop_gradients and features else h)
            features.append(grouped(h, groups, self.channel_axis))
        return tuple(features)

    def __call__(self, x: Any) -> jax.Array:
        """Give the readout's logits, shape (out,), of one example."""
        return self.readout(pooled(self.features(x)[-1]))


def local(
    blocks: Sequence[Callable[[Any], Any]],
    example: Any,
    out_size: int,
    *,
    groups: int | Sequence[int] = 1,
    channel_axis: int = -1,
    projection: int | None = None,
    key: jax.Array,
) -> Local:
    """Give any sequence of blocks local heads, with a loss for each block, patch and group.

    A block maps one array to one array. All axes of what it returns but that of the channels are
    patches: none in an MLP, positions in a convolutional network, tokens in a transformer.

    Args:
        blocks: Equinox modules or other callables, of one example each.
        example: one example, for the shapes.
        out_size: how many classes there are.
        groups: into how many groups the channels of each block are cut: one number, or one for each
            block.
        channel_axis: which axis of a block's output counts channels: the last, or 0 for Equinox's
            convolutions.
        projection: the size of contrastive projectors, which then take the place of the blocks'
            classifiers.
        key: a JAX random key for the heads and the readout.

    Returns:
        A model for `forwax.models.local_losses` and `forwax.models.contrastive_losses`.

    Raises:
        ValueError: when there is no block, or a block's channels cannot be cut into so many groups.

    >>> import forwax as fx, forwax.models
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> relu = eqx.nn.Lambda(jax.nn.relu)
    >>> blocks = [eqx.nn.Sequential([eqx.nn.Linear(6, 6, key=key), relu]) for key in keys]
    >>> model = fx.models.local(blocks, jnp.ones(6), 10, groups=2, key=jax.random.key(1))
    >>> params, static = eqx.partition(model, eqx.is_inexact_array)
    >>> loss = lambda params, x, y: fx.models.local_losses(eqx.combine(params, static), x, y)
    >>> rule = fx.ActivityPerturbation()
    >>> value_and_grad = jax.jit(fx.value_and_grad(loss, rule, in_axes=(None, 0, 0)))
    >>> x, labels = jnp.ones((5, 6)), jnp.zeros(5, int)
    >>> value, grads = value_and_grad(jax.random.key(2), params, x, labels)
    >>> grads.heads[0].weight.shape
    (6, 10)
    """
    if not blocks:
        raise ValueError("local: expected at least one block, got none.")
    counts = (groups,) * len(blocks) if isinstance(groups, int) else tuple(groups)
    if len(counts) != len(blocks):
        raise ValueError(
            f"local: expected groups for each of {len(blocks)} blocks, got {len(counts)}."
        )
    sizes: list[int] = []
    features = example
    for block, count in zip(blocks, counts, strict=True):
        features = eqx.filter_eval_shape(block, features)
        sizes.append(_channels(features.shape, count, channel_axis))
    *head_keys, last_key = jax.random.split(key, len(blocks) + 1)
    width = projection or out_size
    pairs = zip(sizes, head_keys, strict=True)
    return Local(
        blocks=tuple(blocks),
        heads=tuple(ChannelDense(size, width, key=each) for size, each in pairs),
        readout=ChannelDense(sizes[-1], out_size, key=last_key),
        groups=counts,
        channel_axis=channel_axis,
    )


def grouped(h: jax.Array, groups: int, channel_axis: int = -1) -> jax.Array:
    """What a block returns as [P, G, C]: patches, groups, channels of a group."""
    last = jnp.moveaxis(h, channel_axis, -1)
    return last.reshape(-1, groups, last.shape[-1] // groups)


def _channels(shape: tuple[int, ...], groups: int, channel_axis: int) -> int:
    if not -len(shape) <= channel_axis < len(shape):
        raise ValueError(
            f"local: expected a block to return an array with axis {channel_axis}, got shape "
            f"{shape}."
        )
    size = shape[channel_axis]
    if groups < 1 or size % groups:
        raise ValueError(
            f"local: a block of output shape {shape} has {size} channels, which cannot be cut into "
            f"{groups} groups. Pass groups that divide them, one number or one for each block."
        )
    return size
