"""What is known of values before they are computed holds for those that are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from forwax._programs.bounds import of_array
from forwax._programs.ranges import Ranges
from forwax._programs.tracing import trace

N = 5
X = np.random.default_rng(0).normal(size=(N, N)).astype(np.float32)
CAUSAL = np.tri(N, dtype=bool)
SLOPES = np.float32([[[0.5]], [[0.25]]])
DISTANCE = np.float32(np.arange(N)[:, None] - np.arange(N)[None])


def scores(x):
    return jnp.where(CAUSAL, x @ x.T, -jnp.inf)


def softmax(s):
    e = jnp.exp(s - jnp.max(s, -1, keepdims=True))
    return e / jnp.sum(e, -1, keepdims=True)


OFF = ~CAUSAL
FUNCTIONS = {  # of parameters, with where the result is known to be 0
    "softmax": (lambda x: softmax(scores(x)), OFF),
    "jax.nn.softmax": (lambda x: jax.nn.softmax(scores(x)), OFF),
    "powers of 2": (lambda x: jnp.exp2(scores(x)), OFF),
    "by distance": (
        lambda x: softmax(scores(x)[None] - SLOPES * DISTANCE[None])[1],
        OFF,
    ),
    "narrow": (lambda x: softmax(scores(x.astype(jnp.bfloat16))), OFF),
    "reshaped": (lambda x: softmax(scores(x)).reshape(N * N), OFF.ravel()),
    "transposed": (lambda x: softmax(scores(x)).T, OFF.T),
    "flipped": (lambda x: softmax(scores(x))[::-1], OFF[::-1]),
    "window": (lambda x: softmax(scores(x))[1:4, ::2], OFF[1:4, ::2]),
    "joined": (
        lambda x: jnp.concatenate([softmax(scores(x)), jnp.tanh(x)], 1),
        np.hstack([OFF, np.zeros((N, N), bool)]),
    ),
    "limited": (
        lambda x: jnp.minimum(jax.nn.sigmoid(x), CAUSAL.astype(np.float32)),
        OFF,
    ),
    "logic": (
        lambda x: jnp.where((CAUSAL & (x > 0)) | ~CAUSAL.T, x, 0),
        OFF,
    ),
    "sum of nothing": (lambda x: jnp.sum(x * OFF.astype(np.float32), 1), None),
    "cancelled": (lambda x: 1 - (1 - jnp.where(CAUSAL, x, 0.0)), OFF),
    "rounded": (
        lambda x: jnp.where(CAUSAL, x, 1e8) + 1 - 1e8 - 1,
        np.zeros((N, N), bool),
    ),
    "whole numbers": (
        lambda x: jnp.where(CAUSAL, x.astype(int), 0) - 1 + 1,
        np.zeros((N, N), bool),
    ),
    "stepwise": (
        lambda x: lax.scan(
            lambda c, r: (c, c[0] * r[None]), (jnp.tril(CAUSAL * 1.0), 0), x
        )[1],
        np.zeros((N, N, N), bool),
    ),
}


@pytest.mark.promotes("masks as numbers")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_lie_within_their_bounds(name):
    fun, zeros = FUNCTIONS[name]
    traced = trace(fun, jnp.asarray(X))
    known = Ranges(traced).of(traced.program.outputs[0])
    value = np.asarray(fun(jnp.asarray(X)), np.float64)
    assert known.kinds.ndim == value.ndim
    assert np.all(known.bounds.low[known.kinds] <= value)
    assert np.all(value <= known.bounds.high[known.kinds])
    if zeros is not None:
        is_zero = known.bounds.is_zero[known.kinds]
        np.testing.assert_array_equal(np.broadcast_to(is_zero, value.shape), zeros)


def test_many_numbers_are_told_apart_by_size():
    value = np.linspace(-3, 3, 1001)[None].repeat(2, 0)
    value[:, 500] = 0
    value[:, :10] = -np.inf
    value[:, -10:] = 1e9
    known = of_array(value)
    assert known.kinds.shape == (1, 1001)
    assert known.num_kinds == 5
    low, high = known.bounds.low[known.kinds], known.bounds.high[known.kinds]
    assert np.all((low <= value) & (value <= high))
    np.testing.assert_array_equal(known.bounds.is_zero[known.kinds], value[:1] == 0)
    np.testing.assert_array_equal(high == -np.inf, value[:1] == -np.inf)
