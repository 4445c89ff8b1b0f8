"""One linear head on the features of all patches and groups, with credit for each patch and group by itself.

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
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from forwax.losses.cross_entropy import (
    as_targets,
    at_least_float32,
    log_probabilities,
    softmax_cross_entropy,
)


def spatial_average_group_linear(x: Any, w: Any, b: Any) -> Array:
    """A linear head on averaged patches and concatenated groups; each patch and group is credited with its own part.

    The value is the same for all p and g: z[p, g, k] = Σ_gc mean_p(x)[g, c] w[g·C + c, k] + b[k].
    The derivative of z[p, g] with respect to the features is that with respect to x[p, g] alone;
    with respect to w and b it is full.

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


def spatial_average_group_linear_cross_entropy(x: Any, w: Any, b: Any, labels: Any) -> Array:
    """The softmax cross-entropy of `spatial_average_group_linear`, for each patch and group, without its logits.

    The value is the same for all p and g. The derivative of entry [p, g] with respect to the
    features is that with respect to x[p, g] alone; with respect to w, b and labels it is full.

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
    return spread(_logits_like(x, w, b)[1], x, last=1)


@functools.partial(_linear.defjvp, symbolic_zeros=True)
def _linear_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (x, w, b), (dx, dw, db) = primals, tangents
    features, logits = _logits_like(x, w, b)
    slopes = [
        spread(part.astype(logits.dtype), x, last=1) for part in head_slopes(features, dw, db)
    ]
    if moves(dx):
        groups = w.reshape(*x.shape[-2:], -1)
        own = jnp.einsum("...pgc,gck->...pgk", dx, groups) / x.shape[-3]
        slopes.append(own.astype(logits.dtype))
    return spread(logits, x, last=1), added(slopes)


def _logits_like(x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """Features, and logits in the type of the inputs."""
    features = pooled(x)
    return features, affine(features, w, b).astype(jnp.result_type(x, w, b))


@jax.custom_jvp
def _cross_entropy(x: Array, w: Array, b: Array, targets: Array) -> Array:
    return spread(softmax_cross_entropy(affine(pooled(x), w, b), targets), x)


@functools.partial(_cross_entropy.defjvp, symbolic_zeros=True)
def _cross_entropy_jvp(
    primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    (x, w, b, targets), (dx, dw, db, dtargets) = primals, tangents
    features = pooled(x)
    logits = affine(features, w, b)
    targets = targets.astype(logits.dtype)
    error = jax.nn.softmax(logits) * jnp.sum(targets, axis=-1, keepdims=True) - targets
    common = [jnp.sum(error * part, axis=-1) for part in head_slopes(features, dw, db)]
    if moves(dtargets):
        common.append(
            -jnp.sum(
                dtargets.astype(logits.dtype) * log_probabilities(logits, targets),
                axis=-1,
            )
        )
    slopes = [spread(added(common), x)] if common else []
    if moves(dx):
        slopes.append(own_slope(dx, w, error))
    return spread(softmax_cross_entropy(logits, targets), x), added(slopes)


def moves(tangent: Any) -> bool:
    """Whether a rule's tangent is there; else its terms are left out."""
    return not isinstance(tangent, SymbolicZero)


def head_slopes(features: Array, dw: Any, db: Any) -> list[Array]:
    """The slopes [..., K] of `affine` along dw and along db, of those that move."""
    slopes = []
    if moves(dw):
        slopes.append(features @ dw.astype(features.dtype))
    if moves(db):
        zeros = jnp.zeros_like(
            features, shape=(*features.shape[:-1], *db.shape)
        )  # they vary over features' mesh axes
        slopes.append(zeros + _row(db, features))
    return slopes


def added(terms: Sequence[Array]) -> Array:
    """The sum of at least one term."""
    return functools.reduce(operator.add, terms)


def pooled(x: Array) -> Array:
    """Features [..., G·C]: the mean over patches of x [..., P, G, C], in at least float32."""
    mean = jnp.mean(at_least_float32(x), axis=-3)
    return mean.reshape(*mean.shape[:-2], -1)


def affine(features: Array, w: Array, b: Array) -> Array:
    """Logits [..., K] in the features' type."""
    return features @ w.astype(features.dtype) + _row(b, features)


def _row(b: Array, features: Array) -> Array:
    """A bias [K] in the features' type and of their rank."""
    return jnp.expand_dims(b.astype(features.dtype), tuple(range(features.ndim - 1)))


def spread(values: Array, x: Array, last: int = 0) -> Array:
    """Values [...] for every patch and group of x: [..., P, G]; the `last` axes stay behind these."""
    lead = values.ndim - last
    shape = (*values.shape[:lead], *x.shape[-3:-1], *values.shape[lead:])
    return jnp.broadcast_to(jnp.expand_dims(values, (lead, lead + 1)), shape)


def own_slope(dx: Array, w: Array, error: Array) -> Array:
    """The slopes [..., P, G] of a loss along dx [..., P, G, C], each entry along its own part.

    The error [..., K] with respect to the logits meets w first, so that nothing of size P·G·C is
    stored.
    """
    patches, groups, channels = dx.shape[-3:]
    share = error @ w.astype(error.dtype).T / patches
    coefficient = share.reshape(*share.shape[:-1], 1, groups, channels)
    return jnp.sum(dx.astype(error.dtype) * coefficient, axis=-1)


def checked_head(name: str, x: Any, w: Any, b: Any) -> tuple[Array, Array, Array]:
    """Features and head as arrays of shapes that fit; `name` stands in errors."""
    x, w, b = jnp.asarray(x), jnp.asarray(w), jnp.asarray(b)
    if x.ndim < 3:
        raise ValueError(f"{name}: expected features x of shape [..., P, G, C], got {x.shape}.")
    size = x.shape[-2] * x.shape[-1]
    if w.ndim != 2 or w.shape[0] != size or b.shape != w.shape[1:]:
        raise ValueError(
            f"{name}: expected w of shape [G·C, K] = [{size}, K] and b of shape [K] for features "
            f"of shape {x.shape}, "
            f"got {w.shape} and {b.shape}."
        )
    return x, w, b
