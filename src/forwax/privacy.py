"""Differential privacy for slopes: each example's few numbers are clipped, summed and noised.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133) on slopes in place of gradients, as in DP-ZO (Tang et
al. 2024, arXiv 2401.04343) and DPZero (Zhang et al. 2024, arXiv 2310.09639).
"""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._checks import check_count
from forwax._signature import check_key
from forwax._slopes import Slopes, check_form
from forwax.tangents._base import typed_key


def clip_and_noise(
    slopes: Slopes,
    clip: float | Array,
    noise_multiplier: float | Array,
    key: Array,
    *,
    batch_size: int | None = None,
) -> Slopes:
    """The slopes of a private step: the sum over examples of clipped slopes, with noise.

    With c_n = k · weights_n, the k slopes of example n along directions that all examples share,
    it is

        weights = (Σ_n c_n min(1, C / |c_n|) + σ C ξ) / (k B),    ξ normal, [k],

    with the clip C, the noise multiplier σ and the batch size B. One example more or less changes
    the sum by at most C, so that this is one Gaussian mechanism of sensitivity C and noise σ C in k
    dimensions; an accountant turns σ, the rate of sampling and the number of steps into ε and δ.
    No gradient of any example is ever formed. Without clipping and noise it is `Slopes.mean`.

    What the guarantee is about: the weights that come out, and the parameters that are moved by
    them. The keys of directions may be public. The loss's value, `Safe`'s bound of slopes that were
    not noised, and anything else that is computed from data are not covered. For accounting by
    Poisson sampling take each example with the same probability: a mask on a batch of fixed size,
    by `slopes.scaled(mask)`, and the expected size as `batch_size`. Floating-point attacks on
    normal noise (Mironov 2012) are not defended against.

    Args:
        slopes: those of `forwax.slopes(..., per_example=True)`, weights [s, k, N]; of several keys
            each is a mechanism of its own, on examples of its own.
        clip: C > 0, the largest norm of an example's k slopes. An example whose norm is not finite
            counts as zero.
        noise_multiplier: σ ≥ 0.
        key: the key of the noise, which nobody else may know. It must not be one from which
            directions are drawn: those are public.
        batch_size: B; by default N.

    Returns:
        Slopes with weights [s, k], which `forwax.replay` takes.

    Raises:
        TypeError: when the slopes or the key are none.
        ValueError: when there is no axis of examples, clip, multiplier or batch size are out of
            their range, or the key is one of the directions'.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: (x @ w) ** 2
        >>> take = fx.slopes(loss, in_axes=(None, 0), per_example=True)
        >>> value, each = take(jax.random.key(0), jnp.ones(3), jnp.eye(3))
        >>> secret = jax.random.key(1)
        >>> private = fx.privacy.clip_and_noise(each, 0.5, 0.0, secret)
        >>> private.weights.shape, bool(jnp.abs(private.weights).max() <= 0.5)
        ((1, 1), True)
    """
    name = "privacy.clip_and_noise"
    check_form(name, slopes)
    weights = slopes.weights  # [s, k, N]
    if weights.ndim != 3:
        raise ValueError(
            f"{name}: expected a slope for each example, weights [s, k, N], got "
            f"{list(weights.shape)}. forwax.slopes(..., in_axes=..., per_example=True) gives them."
        )
    _check_positive(name, "clip", clip, 0.0)
    _check_positive(name, "noise_multiplier", noise_multiplier, None)
    if batch_size is not None:
        check_count(name, "batch_size", batch_size)
    secret = typed_key(
        check_key(key, name, "key", "Pass jax.random.key(...) of a secret.")
    )
    _check_secret(name, secret, slopes)
    num_tangents = weights.shape[1]
    size = weights.shape[2] if batch_size is None else batch_size
    bound = jnp.asarray(clip, weights.dtype)

    found = weights * num_tangents
    norms = _norms(found)
    # Beyond what can be squared an example is as good as infinite, and none may spoil the sum.
    is_finite = jnp.isfinite(norms)
    shrunk = bound / jnp.maximum(norms, bound)
    clipped = jnp.where(is_finite, found * shrunk, 0)
    total = jnp.sum(clipped, axis=2)  # [s, k]
    noise = jax.random.normal(secret, total.shape, total.dtype)
    scale = jnp.asarray(noise_multiplier, weights.dtype) * bound
    private = (total + scale * noise) / (num_tangents * size)
    return dataclasses.replace(slopes, weights=private)


def _norms(found: Array) -> Array:
    """The norm of each example's slopes [s, 1, N]."""
    squares = jnp.sum(found**2, axis=1, keepdims=True)
    return jnp.sqrt(squares)


def _check_positive(name: str, field: str, value: Any, above: float | None) -> None:
    """Raise a ValueError for a number that is negative or not finite, or 0 where it may not be."""
    if isinstance(value, jax.Array):
        return  # what is traced cannot be refused
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if 0 <= number < math.inf and number != above:
        return
    wanted = "at least 0" if above is None else "more than 0"
    raise ValueError(
        f"{name}: expected {field} to be a number of {wanted}, got {value!r}."
    )


def _check_secret(name: str, secret: Array, slopes: Slopes) -> None:
    """Raise a ValueError where the noise would follow from what is public."""
    data = jax.random.key_data(secret)[None]  # [1, words]
    is_known = not any(map(_tree.is_abstract, (data, slopes.keys)))
    if not is_known or data.shape[1] != slopes.keys.shape[1]:
        return
    same = slopes.keys == jnp.broadcast_to(data, slopes.keys.shape)
    if bool(jnp.any(jnp.all(same, axis=1))):
        raise ValueError(
            f"{name}: expected a secret key, got one from which directions are drawn. Who knows it "
            "could subtract the noise. Take another one, from a secret of its own."
        )
