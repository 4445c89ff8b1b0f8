"""The LocalMixer of Ren et al. 2023: an MLP-Mixer in groups, with a head behind each block.

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv
2210.03310.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from forwax import noise_point
from forwax.models.layers import (
    ChannelDense,
    DepthwiseConv,
    GroupedDense,
    TokenDense,
    standardize,
)
from forwax.models.local_losses import pooled
from forwax.models.local_model import grouped

Normalize: TypeAlias = Literal["channels", "group", "space"]
Mixing: TypeAlias = Literal["dense", "depthwise"]

_AXES = {  # of [P, C] and, after grouping, of [P, G, C]
    "channels": ((1,), (1, 2)),
    "group": ((1,), (2,)),
    "space": ((0, 1), (0, 1, 2)),
}


class Size(NamedTuple):
    """A model of the paper's tables, and the images that it is for there.

    Attributes:
        in_shape: (height, width, channels) of one image.
        out_size: the number of classes.
        options: the blocks, patches, channels and groups of `LocalMixer`.
    """

    in_shape: tuple[int, int, int]
    out_size: int
    options: Mapping[str, int]


def _size(in_shape: tuple[int, int, int], out_size: int, **options: int) -> Size:
    return Size(in_shape, out_size, options)


SIZES: Mapping[str, Size] = {
    "S/1/1": _size((28, 28, 1), 10, blocks=1, patches=1, channels=256, groups=1),
    "M/1/16": _size((28, 28, 1), 10, blocks=1, patches=1, channels=512, groups=16),
    "S/4/8": _size((32, 32, 3), 10, blocks=2, patches=4, channels=128, groups=8),
    "M/8/16": _size((32, 32, 3), 10, blocks=4, patches=8, channels=512, groups=16),
    "L/8/64": _size((32, 32, 3), 10, blocks=4, patches=8, channels=2048, groups=64),
    "L/32/64": _size(
        (224, 224, 3), 1000, blocks=4, patches=32, channels=2048, groups=64
    ),
}
"""The models by size, patches along a side and groups.

S/4/8 is not the paper's but ours, for two CPU cores.
"""


class MixerBlock(eqx.Module):
    """Token mixing, a dense layer over channels, and a dense layer in each group.

    The first block mixes no tokens. Every linear layer is normalised before and after; then comes
    the noise point with the ReLU.

    Attributes:
        mixing: over tokens; None in the first block, which also has no residual connection.
        dense: over channels.
        groups: over the channels of each group.
        normalize: over what the normalisations go.
        epsilon: of the normalisations.
    """

    mixing: TokenDense | DepthwiseConv | None
    dense: ChannelDense
    groups: GroupedDense
    normalize: Normalize = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map patches [P, in], or features [P, G, C] of the block before, to features [P, G, C]."""
        h = x.reshape(x.shape[0], -1)
        if self.mixing is not None:
            h = noisy_relu(self._normalized(self.mixing(self._normalized(h))))
        h = noisy_relu(self._normalized(self.dense(self._normalized(h))))
        h = grouped(h, len(self.groups.weight))
        h = self._normalized(self.groups(self._normalized(h)))
        return noisy_relu(h if self.mixing is None else h + x)

    def _normalized(self, h: jax.Array) -> jax.Array:
        return standardize(h, _AXES[self.normalize][h.ndim - 2], self.epsilon)


class LocalMixer(eqx.Module):
    """An MLP-Mixer with a head behind each block.

    Each head sees all patches, averaged, and all groups, side by side. Use it with
    `forwax.models.local_losses`. `normalize="group"` is the paper's: normalisations go over the
    channels of each token and, after grouping, of each token and group. They have no learnt
    parameters. A group whose units are all off has variance 0, and a normalisation's slope there is
    1/√epsilon; activations have scale 1, so that an epsilon of 0.01 bounds it by 10 and changes
    nothing else to speak of.

    Args:
        in_shape: (height, width, channels) of one example.
        out_size: how many classes there are.
        blocks: the number of blocks.
        patches: the number of patches along each side of the image.
        channels: of each patch's features.
        groups: into which the channels are cut.
        mixing: of tokens: "dense", or "depthwise" for a convolution of each channel.
        kernel: the side of the convolution.
        normalize: over the "channels" of a token; the same, but only those of its "group" after
            grouping; or over the whole "space" of tokens and channels.
        epsilon: what the normalisations add to a variance.
        projection: the size of contrastive projectors, which then take the place of the blocks'
            classifiers.
        key: a JAX random key for the He-normal weights; biases start at zero.

    Attributes:
        blocks: one `MixerBlock` each.
        heads: one linear head for each block.
        readout: the linear classifier on the last block's features.
        patches: the number of patches along each side.

    Raises:
        ValueError: when an image cannot be cut into so many patches, channels into so many groups,
            or an option is none of those above.

    >>> model = LocalMixer.named("M/1/16", key=jax.random.key(0))
    >>> model(jnp.ones((28, 28, 1))).shape
    (10,)
    >>> [features.shape for features in model.features(jnp.ones((28, 28, 1)))]
    [(1, 16, 32)]
    >>> sum(leaf.size for leaf in jax.tree.leaves(model))
    429076
    """

    blocks: tuple[MixerBlock, ...]
    heads: tuple[ChannelDense, ...]
    readout: ChannelDense
    patches: int = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_size: int,
        *,
        blocks: int,
        patches: int,
        channels: int,
        groups: int,
        mixing: Mixing = "dense",
        kernel: int = 3,
        normalize: Normalize = "group",
        epsilon: float = 0.01,
        projection: int | None = None,
        key: jax.Array,
    ):
        height, width, in_channels = in_shape
        _check(in_shape, blocks, patches, channels, groups, mixing, normalize)
        inside = height // patches * (width // patches) * in_channels
        *block_keys, head_key, last = jax.random.split(key, blocks + 2)

        def block(index: int, key: jax.Array) -> MixerBlock:
            first, second, third = jax.random.split(key, 3)
            token: Any = None
            if index and mixing == "dense":
                token = TokenDense(patches**2, key=first)
            elif index:
                token = DepthwiseConv(channels, size=kernel, key=first)
            dense = ChannelDense(channels if index else inside, channels, key=second)
            in_groups = GroupedDense(groups, channels // groups, key=third)
            return MixerBlock(token, dense, in_groups, normalize, epsilon)

        self.blocks = tuple(block(i, each) for i, each in enumerate(block_keys))
        head_keys = jax.random.split(head_key, blocks)
        self.heads = tuple(
            ChannelDense(channels, projection or out_size, key=each)
            for each in head_keys
        )
        self.readout = ChannelDense(channels, out_size, key=last)
        self.patches = patches

    @classmethod
    def named(
        cls,
        name: str,
        *,
        in_shape: tuple[int, int, int] | None = None,
        out_size: int | None = None,
        key: jax.Array,
        **options: Any,
    ) -> LocalMixer:
        """Build a model of the paper's table: size, patches along a side, groups.

        Args:
            name: "S/1/1" or "M/1/16" (28×28×1), "M/8/16" or "L/8/64" (32×32×3), "L/32/64"
                (224×224×3, 1000 classes); or "S/4/8" (32×32×3), a small one that is not the
                paper's.
            in_shape: another shape of the images.
            out_size: another number of classes.
            key: a JAX random key.
            options: those of `LocalMixer`, such as `projection=128`.

        Raises:
            ValueError: when there is no model of this name.
        """
        if name not in SIZES:
            raise ValueError(
                f"LocalMixer.named: expected one of {', '.join(SIZES)}, got {name!r}."
            )
        size = SIZES[name]
        return cls(
            in_shape or size.in_shape,
            out_size or size.out_size,
            **{**size.options, **options},
            key=key,
        )

    def features(
        self, x: jax.Array, *, stop_gradients: bool = False
    ) -> tuple[jax.Array, ...]:
        """Each block's features [P, G, C] of one example; `stop_gradients` cuts between blocks."""
        features: list[jax.Array] = []
        h = patchify(x, self.patches)
        for block in self.blocks:
            h = block(jax.lax.stop_gradient(h) if stop_gradients and features else h)
            features.append(h)
        return tuple(features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the readout's logits, shape (out,), of one example (height, width, channels)."""
        return self.readout(pooled(self.features(x)[-1]))


def noisy_relu(z: jax.Array) -> jax.Array:
    """ReLU with a noise point whose noise enters live units alone.

    The mark stands behind the ReLU, so that a unit that is off passes no noise on and gets no
    error.

    >>> noisy_relu(jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    return jnp.where(z > 0, noise_point(jax.nn.relu(z)), jnp.zeros((), z.dtype))


def patchify(image: jax.Array, patches: int) -> jax.Array:
    """Cut an image (height, width, channels) into patches² flat patches, row by row.

    >>> patchify(jnp.arange(16.0).reshape(4, 4, 1), 2)[1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    height, width, channels = image.shape
    tiles = image.reshape(
        patches, height // patches, patches, width // patches, channels
    )
    return tiles.transpose(0, 2, 1, 3, 4).reshape(patches**2, -1)


def _check(
    in_shape: tuple[int, int, int],
    blocks: int,
    patches: int,
    channels: int,
    groups: int,
    mixing: str,
    normalize: str,
) -> None:
    height, width, _ = in_shape
    if min(blocks, patches, channels, groups) < 1:
        raise ValueError(
            f"LocalMixer: expected counts of at least 1, got {blocks=}, {patches=}, {channels=}, "
            f"{groups=}."
        )
    if height % patches or width % patches:
        raise ValueError(
            f"LocalMixer: an image of {height}×{width} cannot be cut into {patches}×{patches} "
            f"patches."
        )
    if channels % groups:
        raise ValueError(
            f"LocalMixer: {channels} channels cannot be cut into {groups} groups."
        )
    if mixing not in ("dense", "depthwise"):
        raise ValueError(
            f'LocalMixer: expected mixing to be "dense" or "depthwise", got {mixing!r}.'
        )
    if normalize not in _AXES:
        raise ValueError(
            f'LocalMixer: expected normalize to be "channels", "group" or "space", got '
            f"{normalize!r}."
        )
