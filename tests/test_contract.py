"""Law 1: the value is the loss's own, and the gradients' form that of `jax.value_and_grad`.

Structure, shapes and dtypes.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from cases import (
    CASE_RULE_IDS,
    CASE_RULES,
    CASES,
    EXAMPLE_RULES,
    RULES,
    SITE_RULES,
    Case,
    assert_trees_close,
    complex_loss,
    normal,
    quadratic,
)

ALL_RULES = RULES | SITE_RULES | EXAMPLE_RULES


def shapes(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def split(case: Case, output):
    """`((value, aux), grads)` whatever `has_aux` is."""
    value, grads = output
    return (value if case.options.get("has_aux") else (value, None)), grads


@functools.cache
def form(name: str):
    case = next(case for case in CASES if case.name == name)
    return shapes(
        jax.eval_shape(case.reference) if case.traceable else case.reference()
    )


@pytest.mark.parametrize(("case", "rule"), CASE_RULES, ids=CASE_RULE_IDS)
def test_the_form_is_that_of_jax(case, rule):
    reference = form(case.name)

    def estimate():
        return split(case, case.estimate(ALL_RULES[rule], jax.random.key(0)))

    output = jax.eval_shape(estimate) if case.traceable else estimate()
    assert shapes(output) == reference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_exact_gradients_are_those_of_jax(case):
    """All in one program.

    The reference, the exact gradient, and the values and aux of a random rule.
    """
    exact = {"exact-chunked"} | ({"reverse-by-slopes"} if case.traceable else set())
    rules = {name: RULES[name] for name in {"weight-chunked"} | exact}

    def everything():
        key = jax.random.key(0)
        return case.reference(), {
            name: split(case, case.estimate(rule, key)) for name, rule in rules.items()
        }

    (value, grads), outputs = (jax.jit(everything) if case.traceable else everything)()
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(grads))
    for name, (got_value, got_grads) in outputs.items():
        assert_trees_close(got_value, value)
        if name in exact:
            assert_trees_close(got_grads, grads, rtol=1e-4 + 4 * rounding, atol=1e-5)


@pytest.mark.parametrize("name", ["vector", "dict", "per-example-aux", "while-loop"])
def test_the_value_of_a_finite_difference_is_close(name):
    case = next(case for case in CASES if case.name == name)

    @jax.jit
    def both():
        estimate = case.estimate(fx.FiniteDifference(epsilon=1e-3), jax.random.key(0))
        return split(case, estimate)[0][0], case.reference()[0][0]

    assert_trees_close(*both(), rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_finite_differences_in_low_precision(dtype):
    """A step that the floats around a parameter can take gives the slope to their rounding."""
    rule = fx.FiniteDifference(
        fx.tangents.Coordinate(replace=False),
        3,
        epsilon=float(jnp.finfo(dtype).eps) ** 0.5,
    )
    loss = lambda w: jnp.sum(jnp.arange(1.0, 4.0) * w.astype(jnp.float32))
    grads = jax.jit(fx.grad(loss, rule))(
        jax.random.key(0), jnp.array([1.0, 2.0, -0.5], dtype)
    )
    assert_trees_close(grads, jnp.arange(1.0, 4.0).astype(dtype), rtol=0.1)


@pytest.mark.parametrize(
    "params", [{}, (jnp.zeros((0, 3)), jnp.zeros(0))], ids=["none", "empty"]
)
def test_parameters_without_coordinates(params):
    for rule in (fx.Exact(), fx.WeightPerturbation(), fx.FiniteDifference()):
        value, grads = fx.value_and_grad(lambda p: jnp.ones(()), rule)(
            jax.random.key(0), params
        )
        assert float(value) == 1.0
        assert shapes(grads) == shapes(params)


DTYPES = ["bfloat16", "float16", "float32", "complex64", "float64", "complex128"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rule", ["weight-chunked", "weight-projection", "exact", "finite-differences"]
)
def test_every_dtype_is_kept(dtype, rule):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        loss = complex_loss if "complex" in dtype else quadratic
        params = normal(0, 3, dtype=dtype)
        expected = jax.eval_shape(jax.value_and_grad(loss), params)
        got = jax.eval_shape(
            fx.value_and_grad(loss, RULES[rule]), jax.random.key(0), params
        )
        assert shapes(got) == shapes(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_estimates_are_right_to_the_dtypes_rounding(dtype):
    """The exact gradient, and one sign tangent.

    Its slope times itself, conjugate as `jax.grad` writes it.
    """
    with jax.enable_x64(dtype in ("float64", "complex128")):
        loss = complex_loss if "complex" in dtype else quadratic
        params, key = normal(0, 3, dtype=dtype), jax.random.key(1)

        def everything():
            direction = fx.tangents.Rademacher().sample(key, params)[0]
            value, slope = jax.jvp(loss, (params,), (direction,))
            exact = fx.value_and_grad(loss, fx.Exact(chunk_size=2))(key, params)
            one = fx.value_and_grad(loss)(key, params)
            return (
                exact,
                jax.value_and_grad(loss)(params),
                one,
                (value, slope.astype(dtype) * jnp.conj(direction)),
            )

        exact, reference, one, expected = jax.jit(everything)()
        eps = 8 * float(jnp.finfo(dtype).eps)
        assert_trees_close(exact, reference, rtol=eps, atol=eps)
        assert_trees_close(one, expected, rtol=eps, atol=eps)


def test_many_half_precision_tangents_are_summed_in_float32():
    """Orthonormal coordinates, k = n: exact.

    A bfloat16 running sum would lose the small entries.
    """
    rule = fx.WeightPerturbation(
        fx.tangents.Coordinate(replace=False), num_tangents=64, chunk_size=1
    )
    params = jnp.ones(64, jnp.bfloat16)
    curvature = jnp.linspace(0.01, 1, 64).astype(jnp.bfloat16)

    def loss(w):
        return jnp.sum((curvature * w).astype(jnp.float32))

    assert_trees_close(
        jax.jit(fx.grad(loss, rule))(jax.random.key(0), params), curvature, rtol=1e-2
    )


def test_the_function_says_what_it_is():
    function = fx.value_and_grad(
        quadratic,
        fx.WeightPerturbation(combine=fx.combine.ControlVariate(normal(0, 3))),
    )
    assert (
        function.__doc__
        == "Value and estimated gradient of quadratic, by WeightPerturbation."
    )


def test_grad_is_value_and_grad_without_the_value():
    def loss(w, x):
        return (jnp.vdot(w, x), {"x": x})

    args = (jax.random.key(0), normal(0, 3), normal(1, 3))
    (_, aux), grads = fx.value_and_grad(loss, has_aux=True)(*args)
    assert_trees_close(fx.grad(loss, has_aux=True)(*args), (grads, aux), rtol=0)


def test_aux_need_not_be_arrays():
    """As in JAX, aux may hold strings and Python numbers; arrays in it keep their values."""

    def loss(w):
        return (jnp.sum(w**2), {"name": "first", "w": w, "none": None, "function": len})

    (_, aux), _ = fx.value_and_grad(loss, has_aux=True)(jax.random.key(0), jnp.ones(2))
    assert aux["name"] == "first"
    assert aux["none"] is None
    assert aux["function"] is len
    assert aux["w"].tolist() == [1.0, 1.0]


def test_python_floats_are_parameters():
    value, grads = fx.value_and_grad(lambda w: w**3)(jax.random.key(0), 2.0)
    assert (float(value), float(grads)) == (8.0, 12.0)
