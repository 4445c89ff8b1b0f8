"""Slopes summed over the positions that each coordinate of a noise changes."""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from forwax._programs.links import Link

Pair: TypeAlias = tuple[Array, Array]
"""The product of the rates of some positions, and what they leave at the last of them."""


def heard(slopes: Array, axis: int, link: Link, decay: Array | None) -> Array:
    """The slopes [size] along an axis, summed over what each coordinate [length] changes.

    Args:
        slopes: with the axis.
        axis: the source's.
        link: what the noise's coordinates change.
        decay: by what a slope is multiplied for each position further from the coordinate's own.
    """
    # A slice or a pad may have cut off positions of the source: their slopes are 0.
    first = link.first.clip(0)
    last = link.last.clip(max=link.size - 1)
    is_empty = last < first
    own = _own_positions(link)
    first = np.where(is_empty, 0, first)
    last = np.where(is_empty, 0, last)
    own = own.clip(first, last)
    if np.array_equal(first, last):
        sums = _at(slopes, axis, first)
    else:
        sums = _window_sums(slopes, axis, (first, own, last), decay)
    if not is_empty.any():
        return sums
    mask = _on_axis(is_empty, axis, slopes.ndim)
    return jnp.where(mask, 0, sums)


def _own_positions(link: Link) -> np.ndarray:
    """Which position of a source is a coordinate's own: where what it changes begins.

    If all begins at 0 it is where it ends, and in windows that have both ends it is the same place.
    """
    is_empty = link.last < link.first
    if np.all(is_empty | (link.last >= link.size - 1)):
        return link.first
    if np.all(is_empty | (link.first <= 0)):
        return link.last
    places = np.arange(link.length)
    return places * link.size // link.length


def _window_sums(
    slopes: Array,
    axis: int,
    windows: tuple[np.ndarray, np.ndarray, np.ndarray],
    decay: Array | None,
) -> Array:
    """Σ_t decay^|t - own| slopes_t over windows (first, own, last)."""
    first, own, last = windows
    if decay is None:
        return _sums_behind(slopes, axis, first, last, None)
    behind = _sums_behind(slopes, axis, own, last, decay)
    if np.array_equal(first, own):
        return behind
    # The same the other way round; the own position is in both.
    end = slopes.shape[axis] - 1
    flipped = jnp.flip(slopes, axis)
    before = _sums_behind(flipped, axis, end - own, end - first, decay)
    return behind + before - _at(slopes, axis, own)


def _sums_behind(
    slopes: Array, axis: int, first: np.ndarray, last: np.ndarray, decay: Array | None
) -> Array:
    """Σ_t decay^(t - first) slopes_t from first to last."""
    if decay is None:
        ends = lax.cumsum(slopes, axis, reverse=True)
    else:
        ends = _decaying_sums(slopes, axis, decay)
    sums = _at(ends, axis, first)
    size = slopes.shape[axis]
    is_last = last == size - 1
    if is_last.all():
        return sums
    rest = _at(ends, axis, last + 1)
    if decay is not None:
        steps = jnp.asarray(last + 1 - first, slopes.dtype)
        weights = decay.astype(slopes.dtype) ** steps
        rest *= _on_axis(weights, axis, slopes.ndim)
    mask = _on_axis(is_last, axis, slopes.ndim)
    return sums - jnp.where(mask, 0, rest)


def _at(values: Array, axis: int, positions: np.ndarray) -> Array:
    """The values at some positions of an axis."""
    if np.array_equal(positions, np.arange(values.shape[axis])):
        return values
    return jnp.take(values, positions, axis=axis, mode="clip")


def _on_axis(values: np.ndarray | Array, axis: int, rank: int) -> Array:
    """Values along an axis, to broadcast to arrays of this rank."""
    others = [i for i in range(rank) if i != axis]
    return jnp.expand_dims(values, others)


def _decaying_sums(slopes: Array, axis: int, decay: Array) -> Array:
    """S_t = slopes_t + decay · S_{t+1}."""
    shape = [1] * slopes.ndim
    shape[axis] = slopes.shape[axis]
    rates = jnp.full(shape, decay.astype(slopes.dtype))

    def both(one: Pair, other: Pair) -> Pair:
        rate, total = one
        other_rate, other_total = other
        return rate * other_rate, total * other_rate + other_total

    _, sums = lax.associative_scan(both, (rates, slopes), reverse=True, axis=axis)
    return sums
