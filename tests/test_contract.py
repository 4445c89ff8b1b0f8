"""Law 1: the value is the loss's own, and gradients have the structure, shapes and dtypes of `jax.value_and_grad`'s."""

import jax
import jax.numpy as jnp
import pytest
from cases import (
    CASE_RULE_IDS,
    CASE_RULES,
    CASES,
    RULES,
    Case,
    assert_trees_close,
    complex_loss,
    normal,
    quadratic,
)

import forwax as fx


def shapes(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def split(case: Case, output):
    """`((value, aux), grads)` whatever `has_aux` is."""
    value, grads = output
    return (value if case.options.get("has_aux") else (value, None)), grads


@pytest.mark.parametrize(("case", "rule"), CASE_RULES, ids=CASE_RULE_IDS)
def test_the_form_is_that_of_jax(case, rule):
    reference = jax.eval_shape(case.reference) if case.traceable else case.reference()
    estimate = lambda: split(case, case.estimate(RULES[rule], jax.random.key(0)))
    output = jax.eval_shape(estimate) if case.traceable else estimate()
    assert shapes(output) == shapes(reference)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_aux_and_exact_gradient_are_those_of_jax(case):
    (value, aux), grads = case.reference()
    bfloat16 = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
    (got_value, got_aux), got_grads = split(case, case.estimate(fx.Exact(chunk_size=3), jax.random.key(0)))
    assert_trees_close((got_value, got_aux), (value, aux))
    assert_trees_close(got_grads, grads, rtol=2e-2 if bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["weight", "weight-chunked", "weight-projection", "backprop"])
@pytest.mark.parametrize("case", [case for case in CASES if case.reverse], ids=lambda case: case.name)
def test_value_and_aux_of_random_rules_are_those_of_jax(case, rule):
    estimate, _ = split(case, case.estimate(RULES[rule], jax.random.key(0)))
    assert_trees_close(estimate, case.reference()[0])


@pytest.mark.parametrize("case", [case for case in CASES if case.traceable], ids=lambda case: case.name)
def test_the_value_of_a_finite_difference_is_close(case):
    (value, _), _ = split(case, case.estimate(fx.FiniteDifference(epsilon=1e-3), jax.random.key(0)))
    assert_trees_close(value, case.reference()[0][0], rtol=1e-3)


DTYPES = ["bfloat16", "float16", "float32", "complex64", "float64", "complex128"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["weight-chunked", "weight-projection", "exact", "finite-differences"])
def test_every_dtype_is_kept(dtype, rule):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        loss = complex_loss if "complex" in dtype else quadratic
        params = normal(0, 3, dtype=dtype)
        expected = jax.eval_shape(jax.value_and_grad(loss), params)
        got = jax.eval_shape(fx.value_and_grad(loss, RULES[rule]), jax.random.key(0), params)
        assert shapes(got) == shapes(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_exact_to_the_dtypes_rounding(dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        loss = complex_loss if "complex" in dtype else quadratic
        params = normal(0, 3, dtype=dtype)
        eps = float(jnp.finfo(dtype).eps)
        value, grads = fx.value_and_grad(loss, fx.Exact(chunk_size=2))(jax.random.key(0), params)
        assert_trees_close((value, grads), jax.value_and_grad(loss)(params), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sign_tangent_is_the_slope_times_itself_in_every_dtype(dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        loss = complex_loss if "complex" in dtype else quadratic
        params = normal(0, 3, dtype=dtype)
        direction = fx.tangents.Rademacher().sample(jax.random.key(1), params)[0]
        value, slope = jax.jvp(loss, (params,), (direction,))
        expected = (slope * jnp.conj(direction)).astype(dtype)
        eps = float(jnp.finfo(dtype).eps)
        got = fx.value_and_grad(loss)(jax.random.key(1), params)
        assert_trees_close(got, (value, expected), rtol=8 * eps, atol=8 * eps)


def test_many_half_precision_tangents_are_summed_in_float32():
    """Orthonormal coordinates, k = n: exact. A bfloat16 running sum would lose the small entries."""
    rule = fx.WeightPerturbation(fx.tangents.Coordinate(replace=False), num_tangents=64, chunk_size=1)
    params = jnp.ones(64, jnp.bfloat16)
    curvature = jnp.linspace(0.01, 1, 64).astype(jnp.bfloat16)
    loss = lambda w: jnp.sum((curvature * w).astype(jnp.float32))
    assert_trees_close(fx.grad(loss, rule)(jax.random.key(0), params), curvature, rtol=1e-2)


def test_grad_is_value_and_grad_without_the_value():
    loss = lambda w, x: (jnp.vdot(w, x), {"x": x})
    args = (jax.random.key(0), normal(0, 3), normal(1, 3))
    (_, aux), grads = fx.value_and_grad(loss, has_aux=True)(*args)
    assert_trees_close(fx.grad(loss, has_aux=True)(*args), (grads, aux), rtol=0)


def test_aux_need_not_be_arrays():
    """As in JAX, aux may hold strings and Python numbers; arrays in it keep their values."""
    loss = lambda w: (jnp.sum(w**2), {"name": "first", "w": w, "none": None, "function": len})
    (_, aux), _ = fx.value_and_grad(loss, has_aux=True)(jax.random.key(0), jnp.ones(2))
    assert aux["name"] == "first"
    assert aux["none"] is None
    assert aux["function"] is len
    assert aux["w"].tolist() == [1.0, 1.0]


def test_python_floats_are_parameters():
    value, grads = fx.value_and_grad(lambda w: w**3)(jax.random.key(0), 2.0)
    assert (float(value), float(grads)) == (8.0, 12.0)
