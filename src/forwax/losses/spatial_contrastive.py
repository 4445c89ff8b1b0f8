"""NT-Xent on one linear projector of all patches and groups, with credit for each by itself.

As `forwax.losses.spatial`: dℓ[n, p, g] = Σ_c dx[n, p, g, c] (Σ_k w[g, c, k] ∂ℓ_n/∂z_nk) / P for the
projections z.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax._tree import added, promoted
from forwax.losses.contrastive import keys_of, nt_xent_of
from forwax.losses.spatial import (
    affine,
    checked_head,
    head_slopes,
    moves,
    own_slope,
    pooled,
    spread,
)


def spatial_average_group_linear_nt_xent(
    x: Any, y: Any, w: Any, b: Any, temperature: Any = 0.5, *, axis_name: Any = None
) -> Array:
    """NT-Xent between two views' projections, for each patch and group, the keys being constants.

    Both views are averaged over patches, projected by w and b, and set to unit length; then
    `forwax.losses.nt_xent`. The value is the same for all p and g. The derivative of entry [n, p,
    g] with respect to the features is that with respect to the query's x[n, p, g] (or y) alone;
    with respect to w, b and temperature it is full, through the query.

    Args:
        x: one view's features [N, P, G, C]: examples, patches, groups, channels of a group.
        y: the other view's features [N, P, G, C].
        w: the projector [G·C, K].
        b: [K].
        temperature: τ.
        axis_name: the mesh axis, or axes, of `jax.shard_map` over which examples are spread: views
            on all devices are negatives then.

    Returns:
        Losses [2N, P, G], of x and then of y, in at least float32.

    Raises:
        ValueError: when the shapes do not fit.

    After Ren, Kornblith, Liao, Hinton 2023, arXiv 2210.03310.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from forwax.losses import spatial_average_group_linear_nt_xent
        >>> x, y = jnp.ones((7, 4, 2, 3)), jnp.ones((7, 4, 2, 3))
        >>> losses = jax.jit(spatial_average_group_linear_nt_xent)
        >>> losses(x, y, jnp.ones((6, 5)), jnp.zeros(5)).shape
        (14, 4, 2)
    """
    name = "spatial_average_group_linear_nt_xent"
    x, w, b = checked_head(name, x, w, b)
    y = jnp.asarray(y)
    if x.ndim != 4 or y.shape != x.shape:
        raise ValueError(
            f"{name}: expected two views of one shape [N, P, G, C], got {x.shape} and {y.shape}."
        )
    temperature = jnp.asarray(temperature, promoted(x.dtype, jnp.float32))
    return _nt_xent(axis_name, x, y, w, b, temperature)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _nt_xent(
    axis_name: Any,
    x: Array,
    y: Array,
    w: Array,
    b: Array,
    temperature: Array,
) -> Array:
    views = affine(_features(x, y), w, b)
    return spread(nt_xent_of(views, keys_of(views), temperature, axis_name), x)


@functools.partial(_nt_xent.defjvp, symbolic_zeros=True)
def _nt_xent_jvp(
    axis_name: Any,
    primals: tuple[Array, ...],
    tangents: tuple[Any, ...],
) -> tuple[Array, Array]:
    x, y, w, b, temperature = primals
    dx, dy, dw, db, dtemperature = tangents
    features = _features(x, y)
    views = affine(features, w, b)
    losses = functools.partial(_losses, keys=keys_of(views), axis_name=axis_name)
    values, pull = jax.vjp(lambda views: losses(views, temperature), views)
    # Keys are constants, so that a row of views changes its own loss alone.
    (error,) = pull(jnp.ones_like(values))
    common = [jnp.sum(error * part, axis=-1) for part in head_slopes(features, dw, db)]
    if moves(dtemperature):
        # All losses have the one temperature: a single forward derivative serves every slope.
        one = jnp.ones_like(temperature)
        _, by_temperature = jax.jvp(lambda t: losses(views, t), (temperature,), (one,))
        common.append(by_temperature * dtemperature)
    slopes: list[Array] = []
    if common:
        slopes.append(spread(added(common), x))
    if moves(dx) or moves(dy):
        n = len(x)
        error_x = error[:n]
        error_y = error[n:]
        halves = [_own(dx, x, w, error_x), _own(dy, x, w, error_y)]
        slopes.append(jnp.concatenate(halves))
    return spread(values, x), added(slopes)


def _own(dx: Any, x: Array, w: Array, error: Array) -> Array:
    """The slopes of one view's losses along dx; zeros where the view does not move."""
    if moves(dx):
        return own_slope(dx, w, error)
    return jnp.zeros_like(error, shape=x.shape[:-1])


def _losses(
    views: Array,
    temperature: Array,
    keys: Array,
    axis_name: Any,
) -> Array:
    return nt_xent_of(views, keys, temperature, axis_name)


def _features(x: Array, y: Array) -> Array:
    # [2N, G·C]
    return jnp.concatenate([pooled(x), pooled(y)])
