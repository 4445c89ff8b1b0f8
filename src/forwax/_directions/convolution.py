"""Convolutions piece by piece, and with a single feature."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax._programs.evaluate import bind
from forwax._programs.program import Equation
from forwax._tree import promoted

_MOST_TAPS = 64


_PATCHES = 1 << 21


def in_pieces(equation: Equation, values: Sequence[Any]) -> Array:
    """The convolution itself; on CPU a large one a few examples at a time.

    XLA's convolution there gathers the patches of all examples before it multiplies them: once they
    no longer fit into the caches, and memory is new at each call, 64 examples took 2.3 times as
    long at once as in pieces of eight.
    """
    params = equation.params
    x, kernel = values
    lhs, rhs, out = params["dimension_numbers"]
    batch = lhs[0]
    shape = jnp.shape(x)
    count = shape[batch]
    kernel_shape = jnp.shape(kernel)
    num_features = max(1, kernel_shape[rhs[0]])
    num_taps = math.prod(kernel_shape) // num_features
    spatial = [shape[axis] for axis in lhs[2:]]
    entries = num_taps * math.prod(spatial)
    size = _piece(count, entries)
    # groups of the batch would be torn apart
    is_whole = size == count or params["batch_group_count"] != 1
    if is_whole or jax.default_backend() != "cpu":
        return bind(equation, values)[0]

    def one(x: Array) -> Array:
        piece = jnp.moveaxis(x, 0, batch)
        return bind(equation, [piece, kernel])[0]

    front = jnp.moveaxis(x, batch, 0)
    num_pieces = count // size
    pieces = front.reshape(num_pieces, size, *front.shape[1:])
    result = lax.map(one, pieces)  # [pieces, *one piece's result]
    result = jnp.moveaxis(result, 1 + out[0], 1)  # [pieces, size, *rest]
    rest = result.shape[2:]
    result = result.reshape(count, *rest)
    return jnp.moveaxis(result, 0, out[0])


def _piece(count: int, entries: int) -> int:
    """The largest divisor of the count of examples of which the patches are small together.

    One example's patches have so many entries.
    """
    most = max(1, _PATCHES // max(1, entries))
    sizes = range(1, min(count, most) + 1)
    return max(n for n in sizes if count % n == 0)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """The spatial axes of a convolution, an entry for each.

    Attributes:
        taps: the kernel's sizes.
        sizes: the input's.
        pads: what `lax.pad` takes to pad and spread the input.
        padded: the input's sizes after it.
        strides: those of the windows.
        dilations: the distance of two taps.
        shape: the result's sizes.
    """

    taps: list[int]
    sizes: list[int]
    pads: list[tuple[int, int, int]]
    padded: list[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    shape: list[int]


def _geometry(
    x: Array,
    kernel: Array,
    params: Any,
) -> _Geometry:
    lhs, rhs, _ = params["dimension_numbers"]
    taps = [kernel.shape[axis] for axis in rhs[2:]]
    sizes = [x.shape[axis] for axis in lhs[2:]]
    strides = params["window_strides"]
    dilations = params["rhs_dilation"]
    pads: list[tuple[int, int, int]] = []
    padded: list[int] = []
    shape: list[int] = []
    for i, n in enumerate(sizes):
        low, high = params["padding"][i]
        spread = params["lhs_dilation"][i]
        pads.append((low, high, spread - 1))
        padded.append(low + high + (n - 1) * spread + 1)
        span = (taps[i] - 1) * dilations[i] + 1
        shape.append((padded[i] - span) // strides[i] + 1)
    return _Geometry(
        taps,
        sizes,
        pads,
        padded,
        strides,
        dilations,
        shape,
    )


def one_feature(
    x: Array,
    kernel: Array,
    features: int,
    params: Any,
) -> Array | None:
    """A convolution with one output feature: the taps' dots with the input, then their shifted sum.

    Compilers have no fast convolution for a single feature: on CPU it took a third of the time of
    64 of them. None for large kernels and strides, for which the taps would need more memory than
    the layer itself.
    """
    lhs, _, out = params["dimension_numbers"]
    geometry = _geometry(x, kernel, params)
    num_taps = math.prod(geometry.taps)
    of_taps = num_taps * math.prod(geometry.padded)
    num_inputs = x.shape[lhs[1]]
    of_input = num_inputs * math.prod(geometry.sizes)
    of_result = features * math.prod(geometry.shape)
    is_empty = min(geometry.shape + geometry.sizes) < 1
    of_layer = max(of_input, of_result)
    is_large = num_taps > _MOST_TAPS or of_taps > of_layer
    if is_large or is_empty:
        return None
    dtype = params["preferred_element_type"] or x.dtype
    wide = promoted(dtype, jnp.float32)
    dots = _tap_dots(x, kernel, params, wide)
    pads = [(0, 0, 0), *geometry.pads, (0, 0, 0)]
    dots = lax.pad(dots, jnp.zeros((), wide), pads)
    # each tap's dots, shifted to the positions that they add to
    total: Any = 0
    taps = itertools.product(*map(range, geometry.taps))
    for i, tap in enumerate(taps):
        total = total + _window(dots, i, tap, geometry)
    # from [batch, *positions, 1] to the order of the result's axes
    order = [out[0], *out[2:], out[1]]
    places = [order.index(axis) for axis in range(len(order))]
    return lax.transpose(total, places).astype(dtype)


def _tap_dots(
    x: Array,
    kernel: Array,
    params: Any,
    dtype: Any,
) -> Array:
    """Each tap's dot with the input's features: [batch, *positions, taps]."""
    lhs, rhs, _ = params["dimension_numbers"]
    feature = lhs[1]
    rows = lax.transpose(kernel, (rhs[1], *rhs[2:], rhs[0]))  # [features, *taps, 1]
    rows = rows.reshape(rows.shape[0], -1)
    contracted = ((feature,), (0,))
    dots = lax.dot_general(
        x,
        rows,
        (contracted, ((), ())),
        params["precision"],
        preferred_element_type=dtype,
    )
    # the input's axes but the features, where the dot has left them
    rest = [axis for axis in range(x.ndim) if axis != feature]
    order = [lhs[0], *lhs[2:]]
    places = [rest.index(axis) for axis in order]
    return lax.transpose(dots, [*places, dots.ndim - 1])


def _window(
    dots: Array,
    index: int,
    tap: Sequence[int],
    geometry: _Geometry,
) -> Array:
    """What one tap adds to every position: [batch, *positions, 1]."""
    starts = [0]
    ends = [dots.shape[0]]
    for i, dilation in enumerate(geometry.dilations):
        start = tap[i] * dilation
        last = start + (geometry.shape[i] - 1) * geometry.strides[i]
        starts.append(start)
        ends.append(last + 1)
    return lax.slice(
        dots,
        [*starts, index],
        [*ends, index + 1],
        [1, *geometry.strides, 1],
    )
