"""Gradients that are wider than the parameters."""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from cases import RULES, SITE_RULES, assert_trees_close, normal

KEY = jax.random.key(0)
ALL = RULES | SITE_RULES
NARROW = {
    "w": normal(1, 6, 4, dtype=jnp.bfloat16),
    "b": normal(2, 4, dtype=jnp.float16),
    "c": normal(3, 4),
}
WIDE = jax.tree.map(lambda x: x.astype(jnp.float32), NARROW)
X = normal(4, 5, 6)
NORMALS = {"weight-projection"}
"""Their directions are rounded to the loss's types when they are pushed."""


def loss(params, x):
    """One example, in float32."""
    w, b, c = (params[name].astype(jnp.float32) for name in "wbc")
    return jnp.sum((jnp.tanh(x @ w + b) - c) ** 2)


def gradients(rule, params, *, jitted=True, **options):
    estimate = fx.value_and_grad(loss, rule, in_axes=(None, 0), **options)
    return (jax.jit(estimate) if jitted else estimate)(KEY, params, X)


@pytest.mark.parametrize("jitted", [True, False], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", ALL)
def test_every_rule_gives_float32(name, jitted):
    """What it gives for float32 parameters of the same values, where it has slopes."""
    value, grads = gradients(
        ALL[name], NARROW, jitted=jitted, gradient_dtype=jnp.float32
    )
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    expected_value, expected = gradients(ALL[name], WIDE, jitted=jitted)
    if "difference" in name:  # the step is rounded, and longer where it must be
        return
    assert_trees_close(value, expected_value)
    # What is differentiated without a trace is cast to the narrow type on its way back.
    is_cast = name in NORMALS or name == "backprop"
    rtol, atol = (0.02, 0.02) if is_cast else (1e-5, 1e-6)
    assert_trees_close(grads, expected, rtol=rtol, atol=atol)


def test_differences_keep_their_step():
    """As long as narrow parameters need it: the same estimate, but for its last rounding."""
    rule = fx.FiniteDifference(num_tangents=4)
    _, grads = gradients(rule, NARROW, gradient_dtype=jnp.float32)
    _, rounded = gradients(rule, NARROW)
    again = jax.tree.map(lambda x, own: x.astype(own.dtype), grads, NARROW)
    assert_trees_close(again, rounded, rtol=1e-2)
    assert float(jnp.abs(grads["w"]).min()) > 0


def test_what_is_wide_already_stays_as_it_is():
    _, expected = gradients(fx.WeightPerturbation(), NARROW)
    for dtype in (None, jnp.bfloat16):
        _, grads = gradients(fx.WeightPerturbation(), NARROW, gradient_dtype=dtype)
        want = {"w": "bfloat16", "b": "float16", "c": "float32"}
        if dtype is not None:
            want["b"] = "float32"  # what holds both
        assert {name: str(x.dtype) for name, x in grads.items()} == want
        assert_trees_close(grads["w"], expected["w"])
    grads = fx.grad(lambda z: jnp.abs(z) ** 2, gradient_dtype=jnp.float32)(KEY, 1j)
    assert grads.dtype == jnp.complex64


def test_a_loss_in_half_precision_stays_so():
    """It gets parameters of its own types, also where it branches on their values."""
    seen = []

    def loss(w):
        seen.append(w.dtype)
        return jnp.sum(w**2) if w[0] > 0 else jnp.sum(w)

    w = jnp.array([1.0, 2.0], jnp.bfloat16)
    grads = fx.grad(loss, fx.Exact(), gradient_dtype=jnp.float32)(KEY, w)
    assert grads.dtype == jnp.float32
    assert grads.tolist() == [2.0, 4.0]
    assert set(seen) == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("dtype", [int, jnp.int32, "complex64"])
def test_other_types_are_refused(dtype):
    with pytest.raises(
        TypeError, match=r"expected gradient_dtype to be a floating type"
    ):
        fx.grad(loss, gradient_dtype=dtype)
