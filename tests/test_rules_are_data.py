"""Rules are data: frozen pytrees whose arrays are traced and whose counts are static."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from cases import (
    BIASED,
    COMBINATIONS,
    REVERSE_MODE,
    RULES,
    TANGENTS,
    ReverseBySlopes,
    assert_trees_close,
    normal,
    tree_loss,
)

KEY = jax.random.key(0)
PARAMS = {"a": normal(1, 3), "b": normal(2, 2)}
GUESS = jax.tree.map(lambda x: x + 1, PARAMS)
TANGENT_RULES = {
    case.name: fx.WeightPerturbation(case.make(GUESS), 3) for case in TANGENTS
}
COMBINE_RULES = {
    name: fx.WeightPerturbation(num_tangents=3, combine=make(GUESS))
    for name, make in COMBINATIONS.items()
}
ALL = RULES | TANGENT_RULES | COMBINE_RULES
WITHOUT_ARRAYS = {
    name: rule
    for name, rule in ALL.items()
    if name not in ("guided", "control-variate", "safe")
}


@pytest.mark.parametrize("name", ALL)
def test_a_rule_is_an_argument_of_a_jitted_function(name):
    """Traced as an argument and captured as a constant, in one program."""

    def both(rule, key):
        return fx.grad(tree_loss, rule)(key, PARAMS), fx.grad(tree_loss, ALL[name])(
            key, PARAMS
        )

    got, expected = jax.jit(both)(ALL[name], KEY)
    loose = (
        {"rtol": 0.05, "atol": 0.05}
        if "difference" in name
        else {"rtol": 1e-4, "atol": 1e-5}
    )
    assert_trees_close(got, expected, **loose)


@pytest.mark.parametrize("name", ALL)
def test_a_rule_survives_flattening(name):
    rule = ALL[name]
    leaves, structure = jax.tree.flatten(rule)
    again = structure.unflatten(leaves)
    assert type(again) is type(rule)
    assert repr(again) == repr(rule)
    assert again.relative_mse(50) == rule.relative_mse(50)
    jax.tree.map(
        lambda leaf: None, rule
    )  # leaves that are no arrays pass through __post_init__
    structure.unflatten([object()] * len(leaves))


@pytest.mark.parametrize("name", WITHOUT_ARRAYS)
def test_equal_rules_are_equal_and_hash_alike(name):
    rule = WITHOUT_ARRAYS[name]
    copy = dataclasses.replace(rule)
    assert copy is not rule
    assert copy == rule
    assert hash(copy) == hash(rule)
    others = [
        other
        for other_name, other in WITHOUT_ARRAYS.items()
        if repr(other) != repr(rule)
    ]
    assert others
    assert all(other != rule for other in others)


@pytest.mark.parametrize("name", ["guided", "control-variate", "safe"])
def test_rules_that_hold_arrays_compare_and_hash_without_looking_at_them(name):
    rule = ALL[name]
    assert rule == rule
    assert isinstance(hash(rule), int)
    assert rule != fx.WeightPerturbation()


@pytest.mark.parametrize("name", ALL)
def test_the_text_of_a_rule_names_its_fields(name):
    text = repr(ALL[name])
    assert text.startswith(type(ALL[name]).__name__ + "(")
    for field in dataclasses.fields(ALL[name]):
        assert f"{field.name}=" in text
    assert "object at 0x" not in text


def test_the_text_of_the_default_rule():
    assert repr(fx.WeightPerturbation()) == (
        "WeightPerturbation(tangents=Rademacher(), num_tangents=1, combine=Mean(), "
        "chunk_size=None, per_example=False)"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda x: fx.WeightPerturbation(fx.tangents.Guided(x), 2),
        lambda x: fx.WeightPerturbation(combine=fx.combine.ControlVariate(x)),
        lambda x: fx.FiniteDifference(epsilon=jnp.abs(x["a"][0]) + 0.01),
    ],
    ids=["guided", "control-variate", "epsilon"],
)
def test_a_new_array_value_does_not_retrace(make):
    traces = []

    @jax.jit
    def estimate(rule):
        traces.append(None)
        return fx.grad(tree_loss, rule)(KEY, PARAMS)

    first, second = (
        estimate(make(GUESS)),
        estimate(make(jax.tree.map(lambda x: -3 * x[::-1], GUESS))),
    )
    assert len(traces) == 1
    assert not jnp.allclose(first["a"], second["a"], atol=1e-6)
    estimate(fx.WeightPerturbation(num_tangents=3))  # a new static value does
    assert len(traces) == 2


def test_rules_can_be_mapped():
    """`vmap` over a field that is an array: one estimate for each guess."""
    guesses = normal(3, 4, 5)
    params = normal(4, 5)
    estimate = jax.vmap(
        lambda guess: fx.grad(
            tree_loss, fx.WeightPerturbation(fx.tangents.Guided(guess), 5)
        )(KEY, params)
    )
    exact = jax.grad(tree_loss)(params)
    assert_trees_close(
        jax.jit(estimate)(guesses),
        jnp.broadcast_to(exact, (4, 5)),
        rtol=1e-3,
        atol=1e-3,
    )


POSITIVE = "expected {} to be a positive integer, got {}"


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3", None])
def test_counts_are_checked(bad):
    for rule in (fx.WeightPerturbation, fx.FiniteDifference):
        with pytest.raises(
            ValueError,
            match=f"{rule.__name__}: " + POSITIVE.format("num_tangents", repr(bad)),
        ):
            rule(num_tangents=bad)
    if bad is not None:
        for rule in (fx.WeightPerturbation, fx.Exact):
            with pytest.raises(
                ValueError,
                match=f"{rule.__name__}: " + POSITIVE.format("chunk_size", repr(bad)),
            ):
                rule(chunk_size=bad)


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5, float("nan")])
def test_densities_are_checked(bad):
    with pytest.raises(
        ValueError, match=rf"tangents.Sparse: expected a density in \(0, 1\], got {bad}"
    ):
        fx.tangents.Sparse(bad)


@pytest.mark.parametrize("name", ALL)
def test_stated_properties(name):
    rule = ALL[name]
    biased = name in BIASED or name in ("projection", "shrinkage")
    assert rule.unbiased == (not biased)
    assert rule.reverse_mode == (name in REVERSE_MODE)
    exact = isinstance(rule, fx.Exact | fx.Backprop) or rule == ReverseBySlopes()
    assert (rule.relative_mse(1000) == 0) == exact
    assert 0 < rule.learning_rate_scale(1000) <= 1
