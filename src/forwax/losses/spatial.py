"""One linear head on the features of all patches and groups, with credit for each by itself.

Every (patch, group) sees the features of all patches, averaged, and of all groups, side by side;
but it is credited through its own features only. Literally, features are replicated to [..., P, G,
G·C] with a `stop_gradient` on what belongs to others. Here there is one vector of logits per
example, and the derivative rule gives each entry its own share: for a loss ℓ of the logits z, dℓ[p,
g] = Σ_c dx[p, g, c] (Σ_k w[g, c, k] ∂ℓ/∂z_k) / P, and the full derivative with respect to the head.
One `custom_jvp` rule, linear in its tangents, serves forward and reverse mode.

A rule leaves out the terms of what does not move. They cost time, and are not always zero: of a dot
with zeros that are written into a program, XLA for CPUs (jax 0.10.2) makes NaN at some sizes.

After Ren, Kornblith, Liao, Hinton 2023, arXiv 2210.03310.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from forwax._tree import added, promoted
from forwax.losses.cross_entropy import (
    as_targets,
    at_least_float32,
    log_probabilities,
    softmax_cross_entropy,
)


def spatial_average_group_linear(x: Any, w: Any, b: Any) -> Array:
    """A linear head on averaged patches and concatenated groups.

    Each patch and group is credited with its own part. The value is the same for all p and g:
    z[p, g, k] = Σ_gc mean_p(x)[g, c] w[g·C + c, k] + b[k]. The derivative of z[p, g] with respect
    to the features is that with respect to x[p, g] alone; with respect to w and b it is full.

    Args:
        x: features [..., P, G, C]: patches, groups, channels of a group; any leading axes.
        w: [G·C, K].
        b: [K].

    Returns:
        Logits [..., P, G, K], in the type of the inputs.

    Raises:
        ValueError: when the shapes do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax.losses import spatial_average_group_linear
        >>> x, w, b = jnp.ones((4, 2, 3)), jnp.ones((6, 5)), jnp.zeros(5)
        >>> spatial_average_group_linear(x, w, b).shape
        (4, 2, 5)
        >>> grad = jax.grad(lambda x: spatial_average_group_linear(x, w, b)[1, 0, 0])(x)
        >>> grad[:, :, 0].tolist()
        [[0.0, 0.0], [0.25, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    return _linear(*checked_head("spatial_average_group_linear", x, w, b))


def spatial_average_group_linear_cross_entropy(
    x: Any,
    w: Any,
    b: Any,
    labels: Any,
) -> Array:
    """The softmax cross-entropy of `spatial_average_group_linear`, for each patch and group.

    It does without the logits of each. The value is the same for all p and g. The derivative of
    entry [p, g] with respect to the features is that with respect to x[p, g] alone; with respect to
    w, b and labels it is full.

    Args:
        x: features [..., P, G, C]: patches, groups, channels of a group; any leading axes.
        w: [G·C, K].
        b: [K].
        labels: class numbers [...], integers, or one-hot [..., K], floating.

    Returns:
        Losses [..., P, G], in at least float32.

    Raises:
        TypeError: when the labels are neither integers nor floating.
        ValueError: when the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from forwax.losses import spatial_average_group_linear_cross_entropy
        >>> x, w, b = jnp.ones((7, 4, 2, 3)), jnp.ones((6, 5)), jnp.zeros(5)
        >>> spatial_average_group_linear_cross_entropy(x, w, b, jnp.zeros(7, int)).shape
        (7, 4, 2)
    """
    name = "spatial_average_group_linear_cross_entropy"
    x, w, b = checked_head(name, x, w, b)
    targets = as_targets(name, labels, (*x.shape[:-3], w.shape[-1]))
    return _cross_entropy(x, w, b, targets)


@jax.custom_jvp
def _linear(x: Array, w: Array, b: Array) -> Array:
    _, logits = _logits_like(x, w, b)
    return spread(logits, x, last=1)


@functools.partial(_linear.defjvp, symbolic_zeros=True)
def _linear_jvp(
    primals: tuple[Array, ...],
    tangents: tuple[Any, ...],
) -> tuple[Array, Array]:
    x, w, b = primals
    dx, dw, db = tangents
    features, logits = _logits_like(x, w, b)
    slopes: list[Array] = []
    for part in head_slopes(features, dw, db):
        slopes.append(spread(part.astype(logits.dtype), x, last=1))
    if moves(dx):
        # [G, C, K]: each group's own rows of the head
        groups = w.reshape(*x.shape[-2:], -1)
        own_part = jnp.einsum("...pgc,gck->...pgk", dx, groups) / x.shape[-3]
        slopes.append(own_part.astype(logits.dtype))
    return spread(logits, x, last=1), added(slopes)


def _logits_like(x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """Features, and logits in the type of the inputs."""
    features = pooled(x)
    logits = affine(features, w, b)
    return features, logits.astype(promoted(x, w, b))


@jax.custom_jvp
def _cross_entropy(
    x: Array,
    w: Array,
    b: Array,
    targets: Array,
) -> Array:
    logits = affine(pooled(x), w, b)
    return spread(softmax_cross_entropy(logits, targets), x)


@functools.partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _cross_entropy_jvp(
    primals: tuple[Array, ...],
    tangents: tuple[Any, ...],
) -> tuple[Array, Array]:
    x, w, b, targets = primals
    dx, dw, db, dtargets = tangents
    features = pooled(x)
    logits = affine(features, w, b)
    targets = targets.astype(logits.dtype)
    # ∂ℓ/∂z [..., K]
    probabilities = jax.nn.softmax(logits)
    error = probabilities * jnp.sum(targets, axis=-1, keepdims=True) - targets
    common: list[Array] = []
    for part in head_slopes(features, dw, db):
        common.append(jnp.sum(error * part, axis=-1))
    if moves(dtargets):
        # The loss is linear in its targets.
        weights = dtargets.astype(logits.dtype)
        common.append(-jnp.sum(weights * log_probabilities(logits, targets), axis=-1))
    slopes: list[Array] = []
    if common:
        slopes.append(spread(added(common), x))
    if moves(dx):
        slopes.append(own_slope(dx, w, error))
    losses = softmax_cross_entropy(logits, targets)
    return spread(losses, x), added(slopes)


def moves(tangent: Any) -> bool:
    """Whether a rule's tangent is there; else its terms are left out."""
    return not isinstance(tangent, SymbolicZero)


def head_slopes(
    features: Array,
    dw: Any,
    db: Any,
) -> list[Array]:
    """The slopes [..., K] of `affine` along dw and along db, of those that move."""
    slopes: list[Array] = []
    if moves(dw):
        slopes.append(features @ dw.astype(features.dtype))
    if moves(db):
        shape = (*features.shape[:-1], *db.shape)
        # Zeros like the features, since they vary over the mesh axes of these.
        zeros = jnp.zeros_like(features, shape=shape)
        slopes.append(zeros + _row(db, features))
    return slopes


def pooled(x: Array) -> Array:
    """Features [..., G·C]: the mean over patches of x [..., P, G, C], in at least float32."""
    # [..., P, G, C] -> [..., G, C]
    mean = jnp.mean(at_least_float32(x), axis=-3)
    return mean.reshape(*mean.shape[:-2], -1)


def affine(features: Array, w: Array, b: Array) -> Array:
    """Logits [..., K] in the features' type."""
    product = features @ w.astype(features.dtype)
    return product + _row(b, features)


def _row(b: Array, features: Array) -> Array:
    """A bias [K] in the features' type and of their rank."""
    leading = tuple(range(features.ndim - 1))
    return jnp.expand_dims(b.astype(features.dtype), leading)


def spread(
    values: Array,
    x: Array,
    last: int = 0,
) -> Array:
    """Values [...] for every patch and group of x: [..., P, G]; the `last` axes stay behind."""
    lead = values.ndim - last
    patches_and_groups = x.shape[-3:-1]
    shape = (*values.shape[:lead], *patches_and_groups, *values.shape[lead:])
    expanded = jnp.expand_dims(values, (lead, lead + 1))
    return jnp.broadcast_to(expanded, shape)


def own_slope(
    dx: Array,
    w: Array,
    error: Array,
) -> Array:
    """The slopes [..., P, G] of a loss along dx [..., P, G, C], each entry along its own part.

    The error [..., K] with respect to the logits meets w first, so that nothing of size P·G·C is
    stored.
    """
    patches, groups, channels = dx.shape[-3:]
    share = error @ w.astype(error.dtype).T / patches
    # [..., G·C] -> [..., 1, G, C]
    coefficient = share.reshape(*share.shape[:-1], 1, groups, channels)
    products = dx.astype(error.dtype) * coefficient
    return jnp.sum(products, axis=-1)


def checked_head(
    name: str,
    x: Any,
    w: Any,
    b: Any,
) -> tuple[Array, Array, Array]:
    """Features and head as arrays of shapes that fit; `name` stands in errors."""
    x = jnp.asarray(x)
    w = jnp.asarray(w)
    b = jnp.asarray(b)
    if x.ndim < 3:
        raise ValueError(
            f"{name}: expected features x of shape [..., P, G, C], got {x.shape}."
        )
    size = x.shape[-2] * x.shape[-1]
    is_head = w.ndim == 2 and w.shape[0] == size and b.shape == w.shape[1:]
    if not is_head:
        raise ValueError(
            f"{name}: expected w of shape [G·C, K] = [{size}, K] and b of shape [K] for features "
            f"of shape {x.shape}, got {w.shape} and {b.shape}."
        )
    return x, w, b
