"""Losses of every block, patch and group of a model, supervised and contrastive (Ren et al. 2023).

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv
2210.03310.

A block's loss is that of one linear head on its features [P, G, C], averaged over patches, groups
side by side. It is handed out in P·G parts: entry [p, g] has the value loss / (P·G), the loss's
full derivative with respect to the features of patch p and group g, none with respect to other
features, and 1/(P·G) of its derivative with respect to the head. So the parts add up to the loss,
and their derivatives to its derivative.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import LocalLosses
from forwax.losses import (
    nt_xent,
    nt_xent_of_view,
    softmax_cross_entropy,
    spatial_average_group_linear_cross_entropy,
    spatial_average_group_linear_nt_xent,
)
from forwax.models.layers import ChannelDense

Where: TypeAlias = Literal["global", "local", "greedy"]
"""Where losses sit: behind the readout; behind each block too; and cut by `stop_gradient`."""


class LocalModel(Protocol):
    """What the losses ask of a model: `forwax.models.LocalMixer` and `forwax.models.Local` have it.

    Attributes:
        heads: one linear head for each block.
        readout: the linear classifier on the last block's features.
    """

    heads: tuple[ChannelDense, ...]
    readout: ChannelDense

    def features(self, x: Array, *, stop_gradients: bool = False) -> Sequence[Array]:
        """Each block's features [P, G, C] of one example."""
        ...


def local_losses(
    model: LocalModel,
    x: Array,
    label: Any,
    losses: Where = "greedy",
    *,
    parts: bool = True,
) -> LocalLosses:
    """The supervised losses of one example: cross-entropies of the heads and of the readout.

    Args:
        model: `forwax.models.LocalMixer`, or what `forwax.models.local` returns.
        x: one example.
        label: its class number, or one-hot label [K].
        losses: "global", the readout's loss alone, which trains all blocks; "local", a loss behind
            each block as well, each of which trains this block and those before; "greedy", a loss
            behind each block that trains this block alone, and the readout's, which then trains the
            readout only.
        parts: whether a loss comes in one part for each patch and group, for credit; or as one
            number, through an ordinary dot, so that feedback alignment sees the heads' weights. The
            gradient is the same.

    Returns:
        `forwax.LocalLosses`: "blocks", a tuple of [P, G], or of [] without parts; "readout", for
        "local" of the same shape, for the others [].

    Raises:
        ValueError: when `losses` is none of these.

    Example:
        >>> import forwax as fx, forwax.models
        >>> shape = dict(blocks=2, patches=2, channels=6, groups=3)
        >>> model = fx.models.LocalMixer((4, 4, 1), 10, **shape, key=jax.random.key(0))
        >>> losses = local_losses(model, jnp.ones((4, 4, 1)), 7)
        >>> [part.shape for part in losses.tree["blocks"]]
        [(4, 3), (4, 3)]
    """
    features = _features(model, x, losses)
    last = features[-1]
    if losses == "greedy":
        # The last block has a loss of its own.
        last = lax.stop_gradient(last)
    readout_parts = parts and losses == "local"
    tree: dict[str, Any] = {
        "readout": _cross_entropy(last, model.readout, label, readout_parts)
    }
    if losses != "global":
        pairs = zip(features, model.heads, strict=True)
        tree["blocks"] = tuple(
            _cross_entropy(h, head, label, parts) for h, head in pairs
        )
    return LocalLosses(tree)


def contrastive_losses(
    model: LocalModel,
    x: Array,
    y: Array,
    labels: Any,
    losses: Where = "greedy",
    *,
    temperature: float = 0.5,
    parts: bool = True,
    axis_name: Any = None,
) -> LocalLosses:
    """The contrastive losses of a batch, two views an example, and the readout's supervised loss.

    The readout's features are constants. The heads are projectors: NT-Xent of their outputs, keys
    being constants. The last block's projector serves the global loss too. A loss of the whole
    batch: take it without `in_axes`.

    Args:
        model: as for `local_losses`, with a projector for each head.
        x: one view of each example [N, ...].
        y: the other view [N, ...].
        labels: class numbers [N], or one-hot labels [N, K], for the readout, which trains nothing
            but itself.
        losses: as for `local_losses`, but that the last block's contrastive loss takes the place of
            the readout's: "global" is this loss alone.
        temperature: of NT-Xent.
        parts: as for `local_losses`.
        axis_name: the mesh axis of `jax.shard_map` over which examples are spread: negatives come
            from all devices.

    Returns:
        `forwax.LocalLosses`, whose sum is the mean over the 2N views: "readout" [2N] and "blocks",
        a tuple of [2N, P, G], or of [2N] without parts and for the global loss.

    Raises:
        ValueError: when `losses` is none of those of `local_losses`.

    Example:
        >>> import forwax as fx, forwax.models
        >>> shape = dict(blocks=2, patches=2, channels=6, groups=3, projection=5)
        >>> model = fx.models.LocalMixer((4, 4, 1), 10, **shape, key=jax.random.key(0))
        >>> x, y = jax.random.normal(jax.random.key(1), (2, 7, 4, 4, 1))
        >>> losses = jax.eval_shape(lambda: contrastive_losses(model, x, y, jnp.zeros(7, int)).tree)
        >>> [part.shape for part in losses["blocks"]]
        [(14, 4, 3), (14, 4, 3)]
    """
    views = jnp.concatenate([x, y])
    features = jax.vmap(lambda view: tuple(_features(model, view, losses)))(views)
    pairs = list(zip(features, model.heads, strict=True))
    if losses == "global":
        pairs = pairs[-1:]
        parts = False
    blocks = tuple(
        _nt_xent(h, head, temperature, parts, axis_name) for h, head in pairs
    )
    logits = model.readout(pooled(lax.stop_gradient(features[-1])))
    both_labels = jnp.concatenate([labels, labels])
    readout = softmax_cross_entropy(logits, both_labels) / len(views)
    return LocalLosses({"readout": readout, "blocks": blocks})


def contrastive_loss_of_view(
    model: LocalModel,
    view: Array,
    index: Any,
    label: Any,
    views: Array,
    *,
    temperature: float = 0.5,
) -> LocalLosses:
    """The global `contrastive_losses` of one view, for rules that need a loss of one example.

    Args:
        model: as for `contrastive_losses`.
        view: one view of one example.
        index: its row among all views, an integer.
        label: the example's class number, or one-hot label [K], for the readout.
        views: what `projections(model, x, y)` gives for the batch, constants here: [2N, K].
        temperature: of NT-Xent.

    Returns:
        `forwax.LocalLosses`: "readout" [] and "blocks", a tuple of one array [].
    """
    features = model.features(view)[-1]
    contrast = nt_xent_of_view(
        model.heads[-1](pooled(features)), index, views, temperature
    )
    logits = model.readout(pooled(lax.stop_gradient(features)))
    readout = softmax_cross_entropy(logits, label)
    return LocalLosses({"readout": readout, "blocks": (contrast,)})


def projections(model: LocalModel, x: Array, y: Array) -> Array:
    """The last projector's outputs [2N, K] for two views [N, ...] of a batch."""
    views = jnp.concatenate([x, y])
    return jax.vmap(lambda view: model.heads[-1](pooled(model.features(view)[-1])))(
        views
    )


def pooled(features: Array) -> Array:
    """Features [..., P, G, C] averaged over patches, groups side by side: [..., G·C]."""
    mean = jnp.mean(features, axis=-3)
    return mean.reshape(*mean.shape[:-2], -1)


def _features(model: LocalModel, x: Array, losses: Where) -> Sequence[Array]:
    if losses not in ("global", "local", "greedy"):
        raise ValueError(
            f'expected losses to be "global", "local" or "greedy", got {losses!r}.'
        )
    return model.features(x, stop_gradients=losses == "greedy")


def _cross_entropy(
    features: Array, head: ChannelDense, label: Any, parts: bool
) -> Array:
    if not parts:
        return softmax_cross_entropy(head(pooled(features)), label)
    w, b = _shared(head, features)
    return _parted(spatial_average_group_linear_cross_entropy(features, w, b, label))


def _nt_xent(
    features: Array, head: ChannelDense, temperature: float, parts: bool, axis_name: Any
) -> Array:
    n = len(features) // 2
    if not parts:
        projected = head(pooled(features))
        return nt_xent(
            projected[:n], projected[n:], temperature, axis_name=axis_name
        ) / (2 * n)
    w, b = _shared(head, features)
    x = features[:n]
    y = features[n:]
    losses = spatial_average_group_linear_nt_xent(
        x, y, w, b, temperature, axis_name=axis_name
    )
    return _parted(losses / (2 * n))


def _shared(head: ChannelDense, features: Array) -> tuple[Array, Array]:
    """The head itself, whose derivative each patch and group gets an equal share of."""
    share = 1 / (features.shape[-3] * features.shape[-2])

    def shared(x: Array) -> Array:
        # The difference is 0: the value is x, and the derivative a share of that of x.
        return lax.stop_gradient(x) + share * (x - lax.stop_gradient(x))

    return shared(head.weight), shared(head.bias)


def _parted(losses: Array) -> Array:
    """Entries [..., P, G], each the whole loss, as parts of it; the derivative stays."""
    count = losses.shape[-2] * losses.shape[-1]
    # The difference is 0, as in `_shared`.
    return lax.stop_gradient(losses) / count + (losses - lax.stop_gradient(losses))
