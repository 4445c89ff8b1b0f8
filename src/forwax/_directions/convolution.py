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
    shape = jnp.shape(x)
    count = shape[lhs[0]]
    taps = math.prod(n for axis, n in enumerate(jnp.shape(kernel)) if axis != rhs[0])
    positions = math.prod(shape[axis] for axis in lhs[2:])
    size = _piece(count, taps * positions)
    is_small = size == count
    if is_small or jax.default_backend() != "cpu" or params["batch_group_count"] != 1:
        return bind(equation, values)[0]

    def one(x: Array) -> Array:
        return bind(equation, [jnp.moveaxis(x, 0, lhs[0]), kernel])[0]

    front = jnp.moveaxis(x, lhs[0], 0)
    pieces = front.reshape(count // size, size, *front.shape[1:])
    result = lax.map(one, pieces)  # [pieces, *one piece's result]
    result = jnp.moveaxis(result, 1 + out[0], 1)  # [pieces, size, *rest]
    return jnp.moveaxis(result.reshape(count, *result.shape[2:]), 0, out[0])


def _piece(count: int, entries: int) -> int:
    """The largest divisor of the count of examples of which the patches are small together.

    One example's patches have so many entries.
    """
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return max(n for n in divisors if n == 1 or n * entries <= _PATCHES)


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


def _geometry(x: Array, kernel: Array, params: Any) -> _Geometry:
    lhs, rhs, _ = params["dimension_numbers"]
    taps = [kernel.shape[axis] for axis in rhs[2:]]
    sizes = [x.shape[axis] for axis in lhs[2:]]
    strides = params["window_strides"]
    dilations = params["rhs_dilation"]
    pads = [
        (low, high, spread - 1)
        for (low, high), spread in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    padded = [
        low + high + (n - 1) * (inner + 1) + 1
        for n, (low, high, inner) in zip(sizes, pads, strict=True)
    ]
    spans = [(k - 1) * d + 1 for k, d in zip(taps, dilations, strict=True)]
    shape = [
        (n - span) // stride + 1 for n, span, stride in zip(padded, spans, strides, strict=True)
    ]
    return _Geometry(taps, sizes, pads, padded, strides, dilations, shape)


def one_feature(x: Array, kernel: Array, features: int, params: Any) -> Array | None:
    """A convolution with one output feature: the taps' dots with the input, then their shifted sum.

    Compilers have no fast convolution for a single feature: on CPU it took a third of the time of
    64 of them. None for large kernels and strides, for which the taps would need more memory than
    the layer itself.
    """
    lhs, _, out = params["dimension_numbers"]
    geometry = _geometry(x, kernel, params)
    num_taps = math.prod(geometry.taps)
    held = num_taps * math.prod(geometry.padded)
    of_input = x.shape[lhs[1]] * math.prod(geometry.sizes)
    of_result = features * math.prod(geometry.shape)
    is_empty = min([*geometry.shape, *geometry.sizes]) < 1
    if num_taps > _MOST_TAPS or held > max(of_input, of_result) or is_empty:
        return None
    dtype = params["preferred_element_type"] or x.dtype
    each = _tap_dots(x, kernel, params, promoted(dtype, jnp.float32))
    each = lax.pad(each, jnp.zeros((), each.dtype), [(0, 0, 0), *geometry.pads, (0, 0, 0)])
    total: Any = 0
    for i, tap in enumerate(itertools.product(*map(range, geometry.taps))):
        total = total + _window(each, i, tap, geometry)
    # from [batch, *positions, 1] to the order of the result's axes
    order = [out[0], *out[2:], out[1]]
    return lax.transpose(total, [order.index(axis) for axis in range(len(order))]).astype(dtype)


def _tap_dots(x: Array, kernel: Array, params: Any, dtype: Any) -> Array:
    """Each tap's dot with the input's features: [batch, *positions, taps]."""
    lhs, rhs, _ = params["dimension_numbers"]
    rows = lax.transpose(kernel, (rhs[1], *rhs[2:], rhs[0]))  # [features, *taps, 1]
    rows = rows.reshape(rows.shape[0], -1)
    numbers = (((lhs[1],), (0,)), ((), ()))
    each = lax.dot_general(x, rows, numbers, params["precision"], preferred_element_type=dtype)
    rest = [axis for axis in range(x.ndim) if axis != lhs[1]]
    front = [rest.index(axis) for axis in (lhs[0], *lhs[2:])]
    return lax.transpose(each, [*front, each.ndim - 1])


def _window(each: Array, index: int, tap: Sequence[int], geometry: _Geometry) -> Array:
    """What one tap adds to every position: [batch, *positions, 1]."""
    starts = [i * dilation for i, dilation in zip(tap, geometry.dilations, strict=True)]
    ends = [
        start + (n - 1) * stride + 1
        for start, n, stride in zip(starts, geometry.shape, geometry.strides, strict=True)
    ]
    first = [0, *starts, index]
    last = [each.shape[0], *ends, index + 1]
    return lax.slice(each, first, last, [1, *geometry.strides, 1])
