"""Convolutions piece by piece, and with a single feature."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax._programs.evaluate import bind
from forwax._programs.program import Equation

_MOST_TAPS = 64


_PATCHES = 1 << 21


def in_pieces(equation: Equation, values: Sequence[Any]) -> Array:
    """The convolution itself; on CPU a large one a few examples at a time.

    XLA's convolution there gathers the patches of all examples before it multiplies them: once they
    no longer fit into the caches, and memory is new at each call, 64 examples took 2.3 times as
    long at once as in pieces of eight.
    """
    params, (x, kernel) = equation.params, values
    lhs, rhs, out = params["dimension_numbers"]
    shape, kernel_shape = jnp.shape(x), jnp.shape(kernel)
    count = shape[lhs[0]]
    taps = math.prod(n for axis, n in enumerate(kernel_shape) if axis != rhs[0])
    size = _piece(count, taps * math.prod(shape[axis] for axis in lhs[2:]))
    if jax.default_backend() != "cpu" or params["batch_group_count"] != 1 or size == count:
        return bind(equation, values)[0]

    def one(x: Array) -> Array:
        return bind(equation, [jnp.moveaxis(x, 0, lhs[0]), kernel])[0]

    front = jnp.moveaxis(x, lhs[0], 0)
    found = lax.map(one, front.reshape(count // size, size, *front.shape[1:]))
    found = jnp.moveaxis(found, 1 + out[0], 1)
    return jnp.moveaxis(found.reshape(count, *found.shape[2:]), 0, out[0])


def _piece(count: int, entries: int) -> int:
    """The largest number that divides the count of examples of which the patches, so many entries each, are small."""
    return max(
        n for n in range(1, count + 1) if count % n == 0 and (n == 1 or n * entries <= _PATCHES)
    )


def one_feature(x: Array, kernel: Array, features: int, params: Any) -> Array | None:
    """A convolution with one output feature: the taps' dots with the input's features, then their shifted sum.

    Compilers have no fast convolution for a single feature: on CPU it took a third of the time of
    64 of them. None for large kernels and strides, for which the taps would need more memory than
    the layer itself.
    """
    lhs, rhs, out = params["dimension_numbers"]
    taps, sizes = (
        [kernel.shape[axis] for axis in rhs[2:]],
        [x.shape[axis] for axis in lhs[2:]],
    )
    spans = [(k - 1) * d + 1 for k, d in zip(taps, params["rhs_dilation"], strict=True)]
    pads = [
        (low, high, d - 1)
        for (low, high), d in zip(params["padding"], params["lhs_dilation"], strict=True)
    ]
    strides = params["window_strides"]
    padded = [
        low + high + (n - 1) * (inner + 1) + 1
        for n, (low, high, inner) in zip(sizes, pads, strict=True)
    ]
    shape = [
        (n - span) // stride + 1 for n, span, stride in zip(padded, spans, strides, strict=True)
    ]
    held = math.prod(taps) * math.prod(padded)
    largest = max(x.shape[lhs[1]] * math.prod(sizes), features * math.prod(shape))
    if math.prod(taps) > _MOST_TAPS or held > largest or min([*shape, *sizes]) < 1:
        return None
    dtype = params["preferred_element_type"] or x.dtype
    rows = lax.transpose(kernel, (rhs[1], *rhs[2:], rhs[0])).reshape(kernel.shape[rhs[1]], -1)
    wide = jnp.promote_types(dtype, jnp.float32)
    numbers = (((lhs[1],), (0,)), ((), ()))
    each = lax.dot_general(x, rows, numbers, params["precision"], preferred_element_type=wide)
    rest = [axis for axis in range(x.ndim) if axis != lhs[1]]
    each = lax.transpose(each, [*(rest.index(axis) for axis in (lhs[0], *lhs[2:])), each.ndim - 1])
    each = lax.pad(each, jnp.zeros((), wide), [(0, 0, 0), *pads, (0, 0, 0)])
    total: Any = 0
    for i, place in enumerate(itertools.product(*map(range, taps))):
        starts = [j * d for j, d in zip(place, params["rhs_dilation"], strict=True)]
        ends = [
            a + (n - 1) * stride + 1 for a, n, stride in zip(starts, shape, strides, strict=True)
        ]
        window = lax.slice(each, [0, *starts, i], [each.shape[0], *ends, i + 1], [1, *strides, 1])
        total = total + window
    # from batch, positions, feature to the order of the result's axes
    order = [out[0], *out[2:], out[1]]
    return lax.transpose(total, [order.index(axis) for axis in range(len(order))]).astype(dtype)
