"""What a rule or tangents can do is asked of the value; those of others work by defaults."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax import Array

import forwax as fx
from forwax._signature import Signature
from forwax.tangents import (
    Coordinate,
    Guided,
    Hadamard,
    LowRank,
    Normal,
    Orthonormal,
    Rademacher,
    Sparse,
    Sphere,
)

W = jnp.array([0.5, -1.0, 2.0])
KEY = jax.random.key(0)


def square(w):
    return jnp.sum(w**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halves(fx.tangents.Tangents):
    """Joint directions: signs, each drawn twice over, so that half of them tell something new."""

    def draw(self, key, specs, num_tangents):
        signs = Rademacher().draw(key, specs, -(-num_tangents // 2))
        return [jnp.concatenate([x, x])[:num_tangents] for x in signs]

    def relative_mse(self, n, num_tangents):
        return (n - 1) / -(-num_tangents // 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(fx.tangents.IndependentTangents):
    """Independent entries between -√3 and √3."""

    coordinatewise: ClassVar[bool] = True

    def draw_one(self, key, specs):
        keys = jax.random.split(key, len(specs))
        pairs = zip(keys, specs, strict=True)
        return [
            jax.random.uniform(k, s.shape, s.dtype, -(3**0.5), 3**0.5) for k, s in pairs
        ]

    def relative_mse(self, n, num_tangents):
        return (n + 1.8 - 2) / num_tangents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled(fx.Rule):
    """A rule that knows nothing beyond what a rule must have: twice another's gradient."""

    rule: fx.Rule

    def estimate(self, key: Array, problem: Any) -> tuple:
        value, aux, grads = self.rule.estimate(key, problem)
        return value, aux, jax.tree.map(lambda x: 2 * x, grads)

    def relative_mse(self, n: int) -> float:
        return 1 + 4 * self.rule.relative_mse(n)

    def learning_rate_scale(self, n: int) -> float:
        return 0.5


OF_OTHERS = (Halves(), Uniform())
GUESS = jnp.ones(3)
KNOWN = (
    Coordinate(),
    Guided(GUESS),
    Hadamard(),
    LowRank(),
    Normal(),
    Orthonormal(),
    Rademacher(),
    Sparse(0.5),
    Sphere(),
)


def problem():
    return Signature(square, 0, False, None).bind((W,), {})


def names(capability):
    return {type(t).__name__ for t in (*KNOWN, *OF_OTHERS) if getattr(t, capability)}


def test_tangents_are_asked():
    assert names("drawn_twice") == {"LowRank", "Normal", "Rademacher", "Sparse"}
    assert names("planned") == {"LowRank", "Rademacher"}
    assert names("per_example") == set()
    assert LowRank(per_example=True).per_example
    held = {"Guided", "Orthonormal", "Halves"}
    assert (
        names("one_by_one") == {type(t).__name__ for t in (*KNOWN, *OF_OTHERS)} - held
    )


def test_rules_are_asked():
    signs = fx.WeightPerturbation()
    assert signs.law(problem()) == 2
    assert fx.Safe(signs).law(problem()) == 2
    assert (
        fx.ActivityPerturbation().law(problem()) is None
    )  # its noise is no parameter's
    assert fx.DirectFeedbackAlignment(KEY).law(problem()) is None
    assert signs.inner is signs
    assert fx.Safe(signs).inner is signs
    assert signs.sites(problem()) is None
    assert fx.Exact().basis(problem()) is None
    assert fx.Safe(signs).basis(problem()) is None
    assert fx.WeightPerturbation(LowRank()).basis(problem()) is None
    _, _, mean = signs.basis(problem()).estimate(KEY, problem())
    assert jnp.allclose(mean, 2 * W)


def test_a_rule_of_others_has_defaults():
    rule = Doubled(fx.WeightPerturbation())
    assert rule.law(problem()) == 9
    assert rule.inner is rule
    assert rule.sites(problem()) is None
    assert rule.basis(problem()) is None
    row = fx.diagnose(square, [rule, fx.Safe(rule)])(KEY, W).rules
    assert [r.predicted_mse for r in row] == [9, 9]
    shown = fx.explain(lambda w, x: jnp.sum(jnp.tanh(w * x)), rule)(W, jnp.ones(3))
    assert len(shown.rows) == 1  # as for `ActivityPerturbation()`


@pytest.mark.parametrize("tangents", OF_OTHERS, ids=lambda t: type(t).__name__)
def test_tangents_of_others_have_defaults(tangents):
    rule = fx.WeightPerturbation(tangents, num_tangents=4)
    assert fx.testing.assert_unbiased(rule, square, (W,), tolerance=0.1).basis_sum
    assert fx.diagnose(square, [rule])(KEY, W).rules[0].error is None
    fx.testing.assert_isotropic(tangents, W, 2, tolerance=0.1)
    by_activity = fx.ActivityPerturbation(tangents, num_tangents=2, memory="replay")
    loss = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x * w) * w))
    assert fx.grad(loss, by_activity)(KEY, W, jnp.ones(3)).shape == W.shape
    assert fx.grad(square, fx.FiniteDifference(tangents, 2))(KEY, W).shape == W.shape
    assert fx.Momentum().init(KEY, rule).coefficients.shape == (66, 1, 4)
    with pytest.raises(TypeError, match="drawn one by one and leaf by leaf"):
        fx.update(square, rule, learning_rate=0.1)(KEY, W)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Twice(Uniform):
    """The same, and willing to be drawn a second time."""

    drawn_twice: ClassVar[bool] = True


def test_update_takes_tangents_of_others_that_can_be_drawn_twice():
    rule = fx.WeightPerturbation(Twice(), num_tangents=3)
    _, updated = fx.update(square, rule, learning_rate=0.1)(KEY, W)
    assert jnp.allclose(updated, W - 0.1 * fx.grad(square, rule)(KEY, W), rtol=1e-5)


def test_what_wraps_a_rule_is_not_left_out():
    """`inner` tells what a rule wraps, and yet `update` must not go past the one that wraps."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Open(Doubled):
        @property
        def inner(self):
            return self.rule

    rule = Open(fx.WeightPerturbation())
    assert rule.inner == fx.WeightPerturbation()
    for wrapped in (rule, fx.Safe(rule)):
        with pytest.raises(
            TypeError,
            match=r"expected forwax\.WeightPerturbation or forwax.FiniteDifference, .* got Open",
        ):
            fx.update(square, wrapped, learning_rate=0.1)
