"""Slopes summed over the positions that each coordinate of a noise changes."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax._programs.links import Link


def heard(slopes: Array, axis: int, link: Link, decay: Array | None) -> Array:
    """The slopes [size] along an axis, summed over what each coordinate [length] changes."""
    size = link.size
    # A slice or a pad may have cut off positions of the source: their slopes are 0.
    first = link.first.clip(0, size)
    last = link.last.clip(-1, size - 1)
    is_empty = last < first
    first, last = np.where(is_empty, 0, first), np.where(is_empty, 0, last)
    if np.array_equal(first, last):
        sums = slopes
        if not np.array_equal(first, np.arange(size)):
            sums = jnp.take(slopes, first, axis=axis, mode="clip")
    else:
        sums = _window_sums(slopes, axis, first, last, decay)
    if not is_empty.any():
        return sums
    return jnp.where(_on_axis(is_empty, axis, slopes.ndim), 0, sums)


def _window_sums(
    slopes: Array, axis: int, first: np.ndarray, last: np.ndarray, decay: Array | None
) -> Array:
    """Σ_t decay^|t - own| slopes_t from first to last; own is the coordinate's own position."""
    if decay is None:
        return _sums_behind(slopes, axis, first, last, None)
    size = slopes.shape[axis]
    own = _own_positions(first, last, size)
    behind = _sums_behind(slopes, axis, own, last, decay)
    if np.array_equal(first, own):
        return behind
    flipped = jnp.flip(slopes, axis)
    before = _sums_behind(flipped, axis, size - 1 - own, size - 1 - first, decay)
    return behind + before - jnp.take(slopes, own, axis=axis, mode="clip")


def _own_positions(first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """Which position of a source is a coordinate's own: where what it changes begins.

    If all begins at 0 it is where it ends, and in windows that have both ends it is the same place.
    """
    if np.all(last == size - 1):
        return first
    if np.all(first == 0):
        return last
    own = np.arange(len(first)) * size // len(first)
    return own.clip(first, last)


def _sums_behind(
    slopes: Array, axis: int, first: np.ndarray, last: np.ndarray, decay: Array | None
) -> Array:
    """Σ_t decay^(t - first) slopes_t from first to last."""

    def at(x: Array, positions: np.ndarray) -> Array:
        return jnp.take(x, positions, axis=axis, mode="clip")

    if decay is None:
        ends = lax.cumsum(slopes, axis, reverse=True)
    else:
        ends = _decaying_sums(slopes, axis, decay)
    sums = at(ends, first)
    size = slopes.shape[axis]
    is_last = last == size - 1
    if is_last.all():
        return sums
    rest = at(ends, last + 1)
    if decay is not None:
        steps = jnp.asarray(last + 1 - first, slopes.dtype)
        weights = decay.astype(slopes.dtype) ** steps
        rest *= _on_axis(weights, axis, slopes.ndim)
    return sums - jnp.where(_on_axis(is_last, axis, slopes.ndim), 0, rest)


def _on_axis(values: np.ndarray | Array, axis: int, rank: int) -> Array:
    """Values along an axis, to broadcast to arrays of this rank."""
    others = [i for i in range(rank) if i != axis]
    return jnp.expand_dims(values, others)


def _decaying_sums(slopes: Array, axis: int, decay: Array) -> Array:
    """S_t = slopes_t + decay · S_{t+1}."""
    shape = [1] * slopes.ndim
    shape[axis] = slopes.shape[axis]
    rates = jnp.full(shape, decay.astype(slopes.dtype))

    def both(
        one: tuple[Array, Array], other: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        return one[0] * other[0], one[1] * other[0] + other[1]

    _, sums = lax.associative_scan(both, (rates, slopes), reverse=True, axis=axis)
    return sums
