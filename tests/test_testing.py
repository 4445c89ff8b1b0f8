"""The checks are checked: biased twins must fail them, and the error must name what is wrong."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

import forwax as fx

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.3]]), "b": jnp.array([0.7, -0.2])}
X = jnp.array([1.0, -2.0])


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Twin(fx.Rule):
    """A rule made wrong on purpose: each leaf of an estimate times a factor."""

    rule: fx.Rule
    factors: dict[str, float]

    def estimate(self, key: Array, problem: Any) -> tuple:
        value, aux, grads = self.rule.estimate(key, problem)
        return (
            value,
            aux,
            {name: self.factors[name] * leaf for name, leaf in grads.items()},
        )

    def relative_mse(self, n: int) -> float:
        return self.rule.relative_mse(n)

    def learning_rate_scale(self, n: int) -> float:
        return 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasedWeight(fx.WeightPerturbation):
    """Weight perturbation, 1 % too long."""

    def estimate(self, key: Array, problem: Any) -> tuple:
        value, aux, grads = super().estimate(key, problem)
        return value, aux, jax.tree.map(lambda x: 1.01 * x, grads)


@dataclasses.dataclass(frozen=True)
class Stretched(fx.tangents.Normal):
    """Normals, 1 % too long."""

    def draw_one(self, key, specs):
        return [1.01 * x for x in super().draw_one(key, specs)]


@dataclasses.dataclass(frozen=True)
class Repeated(fx.tangents.Normal):
    """Normals of which the second repeats the first."""

    def draw_one(self, key, specs):
        x = super().draw_one(key, specs)[0]
        return [x.at[1].set(x[0])]


RULE = fx.WeightPerturbation(num_tangents=4)


def test_unbiased_rule_passes_and_states_its_power():
    shown = fx.testing.assert_unbiased(
        Twin(RULE, {"w": 1.0, "b": 1.0}), loss, (PARAMS, X)
    )
    assert not shown.basis_sum
    assert shown.detectable_bias <= 0.0101
    assert shown.detectable_leaf_bias <= 0.51
    assert shown.power == 0.99


@pytest.mark.parametrize(
    ("factors", "leaf"),
    [
        ({"w": 1.01, "b": 1.01}, "for the whole"),
        ({"w": 0.99, "b": 0.99}, "for the whole"),
        ({"w": 1.0, "b": 0.0}, r"0.00000 ± 0.00000 \(it never changes\) for \['b'\]"),
        ({"w": 0.0, "b": 1.0}, r"for \['w'\]"),
        ({"w": 1.0, "b": 2.0}, r"for \['b'\]"),
        ({"w": 2.0, "b": 1.0}, r"for \['w'\]"),
    ],
)
def test_biased_twins_fail_by_draws(factors, leaf):
    with pytest.raises(AssertionError, match=rf"projection .* expected 1, .*{leaf}"):
        fx.testing.assert_unbiased(Twin(RULE, factors), loss, (PARAMS, X))


def test_basis_sum_finds_a_biased_twin_at_once():
    with pytest.raises(AssertionError, match="basis sum"):
        fx.testing.assert_unbiased(BiasedWeight(), loss, (PARAMS, X))


def test_no_basis_sum_without_the_rules_own_code():
    rule = fx.WeightPerturbation(fx.tangents.LowRank(), 4)
    assert not fx.testing.assert_unbiased(
        rule, loss, (PARAMS, X), tolerance=0.1
    ).basis_sum


def test_swapped_coordinates_fail():
    class Swapped(Twin):
        def estimate(self, key, problem):
            value, aux, grads = self.rule.estimate(key, problem)
            return value, aux, grads | {"w": grads["w"].T}

    with pytest.raises(AssertionError, match="biased"):
        fx.testing.assert_unbiased(Swapped(RULE, {}), loss, (PARAMS, X))


def test_projection_is_biased():
    rule = fx.WeightPerturbation(num_tangents=2, combine=fx.combine.Projection())
    with pytest.raises(AssertionError, match="projection"):
        fx.testing.assert_unbiased(rule, loss, (PARAMS, X))


def test_too_few_draws_are_an_error():
    with pytest.raises(ValueError, match="draws are needed, more than max_draws=1000"):
        fx.testing.assert_unbiased(
            fx.WeightPerturbation(), loss, (PARAMS, X), max_draws=1000
        )


def test_zero_gradient_is_an_error():
    with pytest.raises(ValueError, match="finite gradient other than zero"):
        fx.testing.assert_unbiased(RULE, lambda x: jnp.sum(0 * x), (jnp.ones(3),))


def test_isotropic_twins_fail():
    assert fx.testing.assert_isotropic(fx.tangents.Normal(), jnp.zeros(3)) > 10_000
    with pytest.raises(AssertionError, match="not the identity: expected 1"):
        fx.testing.assert_isotropic(Stretched(), jnp.zeros(3))
    with pytest.raises(AssertionError, match="not the identity: expected 0"):
        fx.testing.assert_isotropic(Repeated(), jnp.zeros(3))


def test_contract_finds_a_wrong_value_and_a_second_trace():
    @dataclasses.dataclass(frozen=True)
    class Wrong(Twin):
        def estimate(self, key, problem):
            value, aux, grads = self.rule.estimate(key, problem)
            return value + 1, aux, grads

    class Twice(Twin):
        def estimate(self, key, problem):
            problem.objective(problem.params)
            return self.rule.estimate(key, problem)

    class Half(Twin):
        def estimate(self, key, problem):
            value, aux, grads = self.rule.estimate(key, problem)
            return value, aux, jax.tree.map(lambda x: x.astype(jnp.float16), grads)

    for twin in (Wrong, Twice):
        jax.tree_util.register_dataclass(
            twin, data_fields=["rule", "factors"], meta_fields=[]
        )
    with pytest.raises(AssertionError, match="value is not the loss's own"):
        fx.testing.assert_contract(Wrong(RULE, {}), loss, (PARAMS, X))
    with pytest.raises(AssertionError, match="traced 2 times"):
        fx.testing.assert_contract(Twice(RULE, {}), loss, (PARAMS, X))
    with pytest.raises(AssertionError, match="float16"):
        fx.testing.assert_contract(Half(RULE, {}), loss, (PARAMS, X))
