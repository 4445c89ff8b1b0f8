"""Law 2: every rule that says it is unbiased is, on every case.

By the library's own `assert_unbiased`: exactly, by the sum over basis noise, and by draws, for each
coordinate, each leaf and the whole. Power: a common factor of 1 ± 0.05, or a leaf off by half, is
found with probability 0.99. Exact rules need no draws: they are compared with JAX's gradient on
every case in the law of the form.
"""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from cases import (
    BIASED,
    COMBINATIONS,
    RULES,
    TANGENTS,
    TRACEABLE,
    assert_trees_close,
    eager,
    normal,
)

POWER = {"tolerance": 0.05, "power": 0.99}
DRAWN = {"weight", "weight-chunked", "low-rank"}
"""Rules whose directions are tested below, one distribution after another."""

OTHERS = [name for name in RULES if name not in BIASED | DRAWN]
RULE = fx.WeightPerturbation()
CHUNKED = fx.WeightPerturbation(num_tangents=3, chunk_size=2)
MIXED = (
    normal(1, 2),
    normal(2, 1, dtype=jnp.complex64),
    normal(3, 2, 3),
)  # a matrix for low-rank directions
GUESS = jax.tree.map(lambda x: 0.5 * x + 0.2, MIXED)


def mixed_loss(params):
    """Real and complex leaves, none of whose gradients vanishes, coupled."""
    a, z, b = params
    return (
        jnp.sum(jnp.sin(a)) * jnp.sum((jnp.ones(2) @ b) ** 2)
        + jnp.sum(jnp.abs(z) ** 2)
        + jnp.sum(z**2).imag
    )


@pytest.mark.parametrize("case", TRACEABLE, ids=lambda case: case.name)
def test_signs_are_unbiased_on_every_case(case):
    assert RULE.unbiased
    shown = fx.testing.assert_unbiased(
        RULE, case.loss, case.args, kwargs=case.kwargs, **case.options, **POWER
    )
    assert shown.basis_sum
    assert shown.detectable_bias <= 0.051
    assert shown.detectable_leaf_bias <= 0.51


@pytest.mark.parametrize("case", TRACEABLE, ids=lambda case: case.name)
def test_reverse_mode_by_random_slopes_is_unbiased_on_every_case(case):
    rule = RULES["reverse-by-slopes-random"]
    fx.testing.assert_unbiased(
        rule, case.loss, case.args, kwargs=case.kwargs, **case.options, **POWER
    )


@pytest.mark.parametrize("name", ["nested-tuple", "per-example"])
def test_chunks_are_unbiased(name):
    case = next(case for case in TRACEABLE if case.name == name)
    fx.testing.assert_unbiased(CHUNKED, case.loss, case.args, **case.options, **POWER)


@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_every_distribution_is_unbiased(case):
    rule = fx.WeightPerturbation(case.make(GUESS), 3)
    assert rule.unbiased
    fx.testing.assert_unbiased(rule, mixed_loss, [MIXED], **POWER)


@pytest.mark.parametrize("case", TANGENTS, ids=lambda case: case.name)
def test_every_distribution_is_isotropic(case):
    """In the mean over the k directions of a call; the first of guided ones is fixed."""
    fx.testing.assert_isotropic(case.make(GUESS), MIXED, 3, tolerance=0.05)


@pytest.mark.parametrize("density", [1.0, 0.3, 1e-6, 1e-9])
def test_sparse_signs_are_isotropic_at_every_density(density, monkeypatch):
    """Of all 2³² words those at the edges: as many are positive as negative, and E v² is 1."""
    half = max(1, round(density * 2**31))
    words = jnp.array(
        [0, half - 1, half, 2 * half - 1, min(2 * half, 2**32 - 1)], jnp.uint32
    )
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: words)
    sparse = fx.tangents.Sparse(density)
    v = sparse.draw_one(jax.random.key(0), [jax.ShapeDtypeStruct((5,), jnp.float32)])[0]
    size = float(v[0])
    assert jnp.sign(v).tolist() == [1, 1, -1, -1, -1 if density == 1 else 0]
    assert 2 * half / 2**32 * size**2 == pytest.approx(1, rel=1e-6)


def test_a_control_variate_is_unbiased():
    rule = fx.WeightPerturbation(combine=COMBINATIONS["control-variate"](GUESS))
    assert rule.unbiased
    fx.testing.assert_unbiased(rule, mixed_loss, [MIXED], **POWER)


@pytest.mark.parametrize("combination", ["projection", "shrinkage"])
def test_a_biased_combination_says_so_and_is_found(combination):
    rule = fx.WeightPerturbation(
        num_tangents=3, combine=COMBINATIONS[combination](GUESS)
    )
    assert not rule.unbiased
    with pytest.raises(AssertionError):
        fx.testing.assert_unbiased(rule, mixed_loss, [MIXED], **POWER)


def test_python_control_flow_gives_the_slope_times_the_direction():
    """What makes an estimate unbiased for isotropic directions.

    A loss that cannot be traced is too slow for draws.
    """
    params = jnp.array([0.5, 1.0, 1.5])
    key = jax.random.key(5)
    directions = fx.tangents.Rademacher().sample(key, params, 3)
    slopes = directions @ jax.grad(eager)(params)
    for rule in (CHUNKED, fx.WeightPerturbation(num_tangents=3)):
        assert_trees_close(
            fx.grad(eager, rule)(key, params), slopes @ directions / 3, rtol=1e-4
        )


@pytest.mark.parametrize("name", OTHERS)
def test_exact_rules_pass_the_same_check(name):
    assert RULES[name].unbiased
    fx.testing.assert_unbiased(RULES[name], mixed_loss, [MIXED], **POWER)
