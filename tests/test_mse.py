"""Law 3: the measured mean squared error of every tangent × combination meets its formula.

Power: each mean is over 8192 keys and must lie within 4 standard errors of its law (plus 1e-4 of it
for rounding). The standard errors that these tests see are 0.3 % to 4 % of the law, so that a law
off by more than about 16 % at worst and 2 % at best fails; `test_a_wrong_law_fails` shows it for
the laws that are easily confused with the true one.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import (
    COMBINATIONS,
    TANGENTS,
    TangentCase,
    complex_loss,
    difference,
    inner,
    normal,
)

NUM_KEYS = 8192
NUM_TANGENTS = 3


def loss(params):
    """Twelve real coordinates: a matrix, a complex vector, a scalar and a vector."""
    a, z, s = params["a"], params["z"], params["s"]
    return jnp.sum(jnp.sin(a)) + complex_loss(z) + s**2 * jnp.sum(params["v"])


PARAMS = {
    "a": normal(1, 2, 2),
    "z": normal(2, 2, dtype=jnp.complex64),
    "s": jnp.asarray(1.5),
    "v": jnp.asarray([0.5, -1.0, 0.2]),
}
N = 12


# Not while tests are collected: each is computed when the first test asks for it.
@functools.cache
def keys():
    return jax.random.split(jax.random.key(2024), NUM_KEYS)


@functools.cache
def gradient():
    return jax.jit(jax.grad(loss))(PARAMS)


@functools.cache
def guess():
    mix = lambda g, x: 0.7 * g + 0.4 * x
    return jax.jit(lambda *trees: jax.tree.map(mix, *trees))(gradient(), PARAMS)


@functools.cache
def missed():
    return jax.jit(difference)(gradient(), guess())


def cos2(left, right) -> float:
    return float(inner(left, right) ** 2 / (inner(left, left) * inner(right, right)))


@jax.jit
def errors_from(gradient, estimates):
    def relative(estimate):
        error = difference(estimate, gradient)
        return inner(error, error) / inner(gradient, gradient)

    return jax.vmap(relative)(estimates)


def errors(estimates):
    """|ĝ - g|²/|g|² of a batch of estimates."""
    return errors_from(gradient(), estimates)


@jax.jit
def projections(gradient, estimates):
    """<ĝ, g> and |ĝ|² of a batch of estimates."""
    return jax.vmap(lambda e: (inner(e, gradient), inner(e, e)))(estimates)


def law(case: TangentCase, combination: str) -> float:
    """The formulas, each written down independently of the library."""
    k = NUM_TANGENTS
    mean = case.relative_mse(N, k, cos2(guess(), gradient()))
    if combination == "mean":
        return mean
    if combination == "projection":
        return case.projection(N, k, cos2(guess(), gradient()))
    if (
        combination == "shrinkage"
    ):  # α = 1/(1+M) of the M that the tangents state, which is a bound for a guided mean
        stated = case.relative_mse(N, k, 0.0)
        return (mean + stated**2) / (1 + stated) ** 2
    left_over = float(inner(missed(), missed()) / inner(gradient(), gradient()))
    return case.relative_mse(N, k, cos2(guess(), missed())) * left_over


def deviation(sample, expected: float) -> float:
    """How many standard errors the sample's mean lies from its law."""
    sample = np.asarray(sample, np.float64)
    standard_error = sample.std(ddof=1) / math.sqrt(sample.size) + 1e-4 * abs(expected)
    return abs(sample.mean() - expected) / standard_error


@pytest.fixture(scope="module")
def measured():
    """One compiled program for each distribution, all combinations in it."""
    cache = {}

    def measure(case: TangentCase):
        if case.name not in cache:
            rules = {
                name: fx.WeightPerturbation(
                    case.make(guess()), NUM_TANGENTS, make(guess())
                )
                for name, make in COMBINATIONS.items()
            }

            def estimate(key):
                return {
                    name: fx.grad(loss, rule)(key, PARAMS)
                    for name, rule in rules.items()
                }

            estimates = jax.jit(jax.vmap(estimate))(keys())
            cache[case.name] = {
                name: errors(batch) for name, batch in estimates.items()
            }
        return cache[case.name]

    return measure


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_the_measured_error_meets_its_law(measured, case, combination):
    sample = measured(case)[combination]
    assert deviation(sample, law(case, combination)) < 4
    assert np.std(sample) / math.sqrt(NUM_KEYS) < 0.04 * law(
        case, combination
    )  # the power stated above


@pytest.mark.parametrize(
    ("name", "combination", "wrong"),
    [
        ("signs", "mean", (N + 1) / NUM_TANGENTS),
        ("signs", "mean", N / NUM_TANGENTS),
        ("normal", "mean", (N - 1) / NUM_TANGENTS),
        ("normal", "mean", N / NUM_TANGENTS),
        ("sphere", "mean", (N + 1) / NUM_TANGENTS),
        ("sparse", "mean", (N - 1) / NUM_TANGENTS),
        ("coordinates", "mean", (N - 1) / NUM_TANGENTS),
        ("orthonormal", "mean", (N - 1) / NUM_TANGENTS),
        ("hadamard", "mean", (N - 1) / NUM_TANGENTS),
        ("coordinate", "projection", 1 - NUM_TANGENTS / N),
        (
            "guided",
            "mean",
            lambda: (N / NUM_TANGENTS - 1) * (1 - cos2(guess(), gradient())),
        ),
        ("guided", "projection", 1 - NUM_TANGENTS / N),
        ("normal", "projection", 1 - (NUM_TANGENTS - 0.5) / N),
        ("normal", "shrinkage", (N - 1) / (N - 1 + NUM_TANGENTS)),
    ],
)
def test_a_wrong_law_fails(measured, name, combination, wrong):
    case = next(case for case in TANGENTS if case.name == name)
    law = wrong() if callable(wrong) else wrong
    assert deviation(measured(case)[combination], law) > 4


@pytest.mark.parametrize("combination", ["mean", "projection", "shrinkage"])
@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_rules_state_their_law(case, combination):
    """`relative_mse` is the formula, for guided tangents at a guess orthogonal to the gradient."""
    rule = fx.WeightPerturbation(
        case.make(guess()), NUM_TANGENTS, COMBINATIONS[combination](guess())
    )
    mean = case.relative_mse(N, NUM_TANGENTS, 0.0)
    stated = {
        "mean": mean,
        "projection": 1 - NUM_TANGENTS / N,
        "shrinkage": mean / (1 + mean),
    }
    assert rule.relative_mse(N) == pytest.approx(stated[combination])
    difference_rule = fx.FiniteDifference(
        case.make(guess()), NUM_TANGENTS, COMBINATIONS[combination](guess())
    )
    assert difference_rule.relative_mse(N) == pytest.approx(stated[combination])


@pytest.mark.parametrize("density", [0.1, 0.25, 1.0])
def test_the_kurtosis_law(density):
    """(n + κ - 2)/k with κ = 1/p; a single tangent."""
    rule = fx.WeightPerturbation(fx.tangents.Sparse(density))
    sample = errors(
        jax.jit(jax.vmap(lambda key: fx.grad(loss, rule)(key, PARAMS)))(keys())
    )
    assert deviation(sample, N + 1 / density - 2) < 4
    assert rule.relative_mse(N) == pytest.approx(N + 1 / density - 2)
    assert deviation(sample, N + 1) > 4  # that of normals


@pytest.mark.parametrize("name", ["normal", "signs", "orthonormal"])
def test_the_cosine_of_a_projection(name):
    """E cos² = k/n, and the mean of the estimate is (k/n) g."""
    case = next(case for case in TANGENTS if case.name == name)
    rule = fx.WeightPerturbation(case.make(guess()), 4, fx.combine.Projection())
    estimates = jax.jit(jax.vmap(lambda key: fx.grad(loss, rule)(key, PARAMS)))(keys())
    along, squared = (np.asarray(x) for x in projections(gradient(), estimates))
    size = float(inner(gradient(), gradient()))
    squares, along = along**2 / squared / size, along / size
    assert deviation(squares, 4 / N) < 4
    assert deviation(along, 4 / N) < 4
    assert deviation(squares, 3.5 / N) > 4


def test_the_recycled_projection():
    """The last estimate is the guide and g is fixed: (1 - k/n)(1 - (k-1)/(n-1))^(t-1)."""
    n, k, steps = 64, 9, 30
    gradient = normal(7, n)

    def run(key):
        def step(guide, key):
            rule = fx.WeightPerturbation(
                fx.tangents.Guided(guide), k, fx.combine.Projection()
            )
            estimate = fx.grad(lambda w: jnp.vdot(gradient, w), rule)(key, jnp.zeros(n))
            return estimate, jnp.sum((estimate - gradient) ** 2) / jnp.sum(gradient**2)

        return jax.lax.scan(step, jnp.zeros(n), jax.random.split(key, steps))[1]

    history = jax.jit(jax.vmap(run))(keys()[:256])
    expected = [(1 - k / n) * (1 - (k - 1) / (n - 1)) ** t for t in range(steps)]
    assert expected[0] == pytest.approx(0.86, abs=0.005)
    assert expected[-1] == pytest.approx(0.017, abs=0.0005)
    for t in (0, 1, 9, 29):
        assert deviation(history[:, t], expected[t]) < 4
    assert deviation(history[:, 29], expected[28]) > 4


def test_a_single_tangent_of_two_parameters_separates_signs_from_normals():
    """With n = 2, where n - 1 = 1 and n + 1 = 3 are furthest apart."""
    gradient = jnp.asarray([3.0, -1.0])
    point = jnp.zeros(2)

    def sample(tangents):
        rule = fx.WeightPerturbation(tangents)
        estimate = jax.vmap(
            lambda key: fx.grad(lambda w: jnp.vdot(gradient, w), rule)(key, point)
        )(keys())
        return jnp.sum((estimate - gradient[None]) ** 2, axis=1) / jnp.sum(gradient**2)

    signs, normals = jax.jit(
        lambda: (sample(fx.tangents.Rademacher()), sample(fx.tangents.Normal()))
    )()
    assert deviation(signs, 1.0) < 4 < deviation(signs, 3.0)
    assert deviation(normals, 3.0) < 4 < deviation(normals, 1.0)


SCALED = {
    "signs": fx.WeightPerturbation(num_tangents=3),
    "normal": fx.WeightPerturbation(fx.tangents.Normal(), 3),
    "orthonormal": fx.WeightPerturbation(fx.tangents.Orthonormal(), 3),
    "projection": fx.WeightPerturbation(
        fx.tangents.Orthonormal(), 3, fx.combine.Projection()
    ),
    "shrinkage": fx.WeightPerturbation(num_tangents=3, combine=fx.combine.Shrinkage()),
}


@pytest.mark.parametrize("name", SCALED)
def test_the_suggested_learning_rate_is_the_best_step(name):
    """E<ĝ, g> / E|ĝ|², by the ratio estimator's standard error."""
    rule = SCALED[name]
    estimates = jax.jit(jax.vmap(lambda key: fx.grad(loss, rule)(key, PARAMS)))(keys())
    along, squared = (
        np.asarray(x, np.float64) for x in projections(gradient(), estimates)
    )
    scale = fx.suggest_learning_rate(rule, N, 1.0)
    assert deviation(1 + (along - scale * squared) / squared.mean(), 1.0) < 4
    assert deviation(1 + (along - 1.2 * scale * squared) / squared.mean(), 1.0) > 4


def test_learning_rate_scales_follow_the_laws():
    assert fx.suggest_learning_rate(fx.Exact(), 100, 0.5) == 0.5
    assert fx.suggest_learning_rate(fx.Backprop(), 100, 0.5) == 0.5
    k, n = 4, 99
    assert fx.suggest_learning_rate(
        fx.WeightPerturbation(fx.tangents.Normal(), k), n, 1.0
    ) == pytest.approx(k / (n + k + 1))
    assert fx.suggest_learning_rate(
        fx.FiniteDifference(num_tangents=k), n, 1.0
    ) == pytest.approx(k / (n + k - 1))
    with pytest.raises(
        ValueError, match="expected the number of coordinates n >= 1, got 0"
    ):
        fx.suggest_learning_rate(fx.Exact(), 0, 1.0)
