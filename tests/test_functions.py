"""The test functions against their published facts, their derivatives against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forwax import functions

CASES = [
    functions.beale,
    functions.himmelblau,
    functions.rosenbrock.in_dimensions(5),
    functions.ackley.in_dimensions(3),
    functions.rastrigin,
    functions.styblinski_tang.in_dimensions(3),
    functions.quadratic(1000.0, n=6),
]
IDS = [f"{case.name}-{case.n}" for case in CASES]
each = pytest.mark.parametrize("function", CASES, ids=IDS)


@each
def test_facts_have_one_dimension(function):
    assert {len(point) for point in function.minima} == {function.n}
    assert len(function.lower) == len(function.upper) == function.n
    inside = [
        lower < x < upper
        for lower, x, upper in zip(
            function.lower, function.start, function.upper, strict=True
        )
    ]
    assert all(inside)
    assert function.source


@each
def test_value_and_gradient_at_every_minimum(function):
    with jax.enable_x64(True):
        for point in function.minima:
            x = jnp.array(point, jnp.float64)
            value, gradient = jax.jit(jax.value_and_grad(function))(x)
            np.testing.assert_allclose(value, function.minimum, rtol=0, atol=1e-12)
            np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


@each
def test_no_nearby_point_is_lower(function):
    with jax.enable_x64(True):
        offsets = 1e-3 * np.random.default_rng(0).normal(size=(64, function.n))
        for point in function.minima:
            values = jax.jit(jax.vmap(function))(
                jnp.asarray(np.asarray(point)[None] + offsets)
            )
            assert np.all(np.asarray(values) > function.minimum)


@each
def test_gradient_agrees_with_central_differences(function):
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(function.start) + 0.1 * np.arange(1, function.n + 1))
        steps = jnp.asarray(1e-6 * np.eye(function.n))

        @jax.jit
        def three(x, steps):
            slopes = jax.vmap(
                lambda step: (function(x + step) - function(x - step)) / 2e-6
            )(steps)
            return slopes, jax.grad(function)(x), jax.jacfwd(function)(x)

        slopes, gradient, forwards = three(x, steps)
        np.testing.assert_allclose(slopes, gradient, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(forwards, gradient, rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_is_kept(function, dtype):
    with jax.enable_x64(dtype == "float64"):
        value, gradient = jax.eval_shape(
            jax.value_and_grad(function), jnp.array(function.start, dtype)
        )
        assert value.shape == ()
        assert value.dtype == gradient.dtype == jnp.dtype(dtype)


@each
def test_vmap_is_a_loop(function):
    points = np.asarray(function.start)[None] + np.random.default_rng(1).uniform(
        size=(3, function.n)
    )
    points, one = points.astype(np.float32), jax.jit(function)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(function))(points), [one(point) for point in points], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("function", "point", "value"),
    [
        (functions.beale, (1.0, 1.0), 14.203125),
        (functions.beale, (0.0, 0.0), 14.203125),
        (functions.rosenbrock, (-1.2, 1.0), 24.2),
        (functions.rosenbrock, (-1.0, 0.0), 104.0),
        (functions.rosenbrock, (0.0, 0.0, 0.0), 2.0),
        (functions.himmelblau, (0.0, 0.0), 170.0),
        (functions.himmelblau, (-0.270845, -0.923039), 181.616522),
        (functions.ackley, (1.0, 1.0), 3.6253849384403627),
        (functions.ackley, (1.0, 1.0, 1.0, 1.0), 3.6253849384403627),
        (functions.rastrigin, (1.0, 1.0), 2.0),
        (functions.rastrigin, (0.5,), 20.25),
        (functions.styblinski_tang, (-2.903534, -2.903534), -78.332331),
        (functions.styblinski_tang, (1.0, 1.0, 1.0), -15.0),
        (functions.quadratic(100.0), (1.0, 1.0), 50.5),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_known_values(function, point, value):
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            jax.jit(function)(jnp.array(point, jnp.float64)), value, rtol=1e-7
        )


def test_himmelblau_starts_near_its_local_maximum():
    with jax.enable_x64(True):
        summit = jnp.array([-0.2708445906694, -0.9230385564666], jnp.float64)
        function = functions.himmelblau
        gradient, hessian = jax.jit(
            lambda x: (jax.grad(function)(x), jax.hessian(function)(x))
        )(summit)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
        assert np.all(np.linalg.eigvalsh(hessian) < 0)


def test_rosenbrock_has_a_local_minimum_in_four_dimensions():
    @jax.jit
    def descended(x):
        x, _ = jax.lax.scan(
            lambda x, _: (x - 1e-3 * jax.grad(functions.rosenbrock)(x), None),
            x,
            None,
            length=2000,
        )
        return jax.value_and_grad(functions.rosenbrock)(x)

    value, gradient = descended(jnp.array([-0.776, 0.613, 0.382, 0.146]))
    assert 3.6 < float(value) < 3.8
    assert np.linalg.norm(gradient) < 1e-2


@pytest.mark.parametrize("n", [1, 9])
def test_ackley_at_its_cone(n):
    ackley = functions.ackley
    derivatives = jax.jit(
        lambda x: (ackley(x), jax.grad(ackley)(x), jax.jacfwd(ackley)(x))
    )
    for at_origin in derivatives(jnp.zeros(n)):
        np.testing.assert_array_equal(at_origin, 0.0)
    _, near, _ = derivatives(jnp.full(n, 1e-6))
    np.testing.assert_allclose(np.linalg.norm(near), 4 / n**0.5, rtol=1e-3)


def test_quadratic_has_its_condition_number():
    hessian = np.asarray(
        jax.jit(jax.hessian(functions.quadratic(1000.0, n=4)))(jnp.ones(4))
    )
    np.testing.assert_allclose(np.diag(hessian), [1.0, 10.0, 100.0, 1000.0], rtol=1e-5)
    np.testing.assert_array_equal(hessian - np.diag(np.diag(hessian)), 0.0)


def test_distance_is_to_the_nearest_minimum():
    assert float(
        functions.himmelblau.distance(jnp.array([-3.779310, -2.283186]))
    ) == pytest.approx(1.0, abs=1e-5)
    assert float(
        functions.rosenbrock.in_dimensions(4).distance(jnp.zeros(4))
    ) == pytest.approx(2.0)


def test_functions_are_values():
    assert functions.quadratic(10.0) == functions.quadratic(10.0)
    assert functions.quadratic(10.0) != functions.quadratic(20.0)
    assert functions.beale.in_dimensions(2) is functions.beale
    value = jax.jit(lambda function, x: function(x), static_argnums=0)(
        functions.beale, jnp.zeros(2)
    )
    assert float(value) == 14.203125


@pytest.mark.parametrize(
    "name",
    [
        "beale",
        "rosenbrock",
        "himmelblau",
        "ackley",
        "rastrigin",
        "styblinski_tang",
        "quadratic",
    ],
)
def test_by_name(name):
    assert functions.by_name(name).name == name


def test_errors_say_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"beale takes one point, an array of shape \[2\], but got shape \[3\]",
    ):
        functions.beale(jnp.zeros(3))
    with pytest.raises(
        ValueError,
        match=r"shape \[n\], but got shape \[4, 2\]; for many points use jax.vmap",
    ):
        functions.ackley(jnp.zeros((4, 2)))
    with pytest.raises(
        ValueError, match="beale is a function of 2 variables, so it cannot have n=3"
    ):
        functions.beale.in_dimensions(3)
    with pytest.raises(ValueError, match="needs n >= 1 variables, but got n=0"):
        functions.rosenbrock.in_dimensions(0)
    with pytest.raises(ValueError, match=r"at least 1, but got condition_number=0\.5"):
        functions.quadratic(0.5)
    with pytest.raises(
        ValueError, match="no test function 'bukin'; choose one of beale, rosenbrock"
    ):
        functions.by_name("bukin")
