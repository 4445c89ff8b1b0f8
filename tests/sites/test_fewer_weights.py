"""`noise="auto"`: weight noise of each example where a site has fewer weights than activities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._signature import Signature
from helpers import basis_of, estimates, problem_of
from sites.programs import PROGRAMS, Program, normal
from sites.sharded import EACH, PARAMS, sharded

KEY = jax.random.key(0)
AUTO = fx.ActivityPerturbation(noise="auto")
N, T, C = 2, 6, 3


def norm(p, x):
    """As Flax computes it."""
    mean = jnp.mean(x, -1, keepdims=True)
    factor = lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-3) * p["scale"][None]
    return (x - mean) * factor + p["bias"][None]


def block(p, x):
    return x + jnp.tanh(norm(p, x) @ p["w"]) @ p["v"]


def params(*lead):
    return {
        "scale": 1 + normal(1, *lead, C),
        "bias": normal(2, *lead, C),
        "w": normal(3, *lead, C, 8),
        "v": normal(4, *lead, 8, C),
    }


def positions(p, x):
    """Attention-free mixing over positions, so that no slope is told apart."""
    x = block(p["first"], x)
    return jnp.sum(jnp.sin(jnp.cumsum(jnp.tanh(x), 0) @ p["out"]))


def layers(p, x):
    x = lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])[0]
    return jnp.sum(jnp.sin(jnp.cumsum(jnp.tanh(x), 0) @ p["out"]))


def over_time(p, x):
    """The same weights at each step: one noise for all of them."""

    def step(h, x):
        return jnp.tanh(p["w"] @ h + x * p["gain"]), None

    return jnp.sum(jnp.sin(p["out"] @ lax.scan(step, jnp.zeros(2), x)[0]))


def complex_gain(p, x):
    z = lax.complex(x, x**2) * p["gain"].astype(jnp.complex64)[None] * p["turn"][None]
    h = jnp.cumsum(jnp.real(jnp.exp(1j * z)), 0)
    return jnp.sum(jnp.sin(jnp.tanh(h) @ p["out"]))


OUT = normal(5, C, 2)
CASES = {
    "positions": Program(
        positions, {"first": params(), "out": OUT}, (normal(6, N, T, C),), (None, 0)
    ),
    "layers": Program(
        layers, {"layers": params(2), "out": OUT}, (normal(6, N, T, C),), (None, 0)
    ),
    "over_time": Program(
        over_time,
        {"w": normal(7, 2, 2), "gain": normal(8, 2), "out": normal(9, 2, 2)},
        (normal(10, N, T, 2),),
        (None, 0),
    ),
    "complex_gain": Program(
        complex_gain,
        {
            "gain": normal(7, C),
            "turn": (normal(8, C) + 1j).astype(np.complex64),
            "out": OUT,
        },
        (normal(9, N, T, C),),
        (None, 0),
    ),
}


def noise_at(rule, case):
    table = fx.explain(case.loss, rule, **case.options)(*case.args)
    return {row.operation: row.activity_noise for row in table.rows}


@pytest.mark.parametrize("memory", ["keep", "replay", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_all_noise_is_the_gradient(name, memory):
    case = CASES[name]
    rule = dataclasses.replace(AUTO, memory=memory)
    plain = dataclasses.replace(rule, noise="activity")
    sizes = [
        sum(s.size for s in r.sites(problem_of(case)).noisy) for r in (rule, plain)
    ]
    assert memory == "shared" or sizes[0] < sizes[1]
    (_, got), (_, truth) = estimates(case, basis_of(case, rule), fx.Backprop())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * max(1, np.abs(b).max()))


def test_a_twin_whose_examples_share_their_noise_is_found():
    """One noise for all examples hears of each other's slopes alone: not the gradient."""

    @dataclasses.dataclass(frozen=True)
    class Twin(fx.ActivityPerturbation):
        def _slopes(self, sites, *more):
            slopes = super()._slopes(sites, *more)
            return {v: jnp.flip(x, 1) for v, x in slopes.items()}

    case = CASES["positions"]
    right, wrong = (cls(noise="auto") for cls in (fx.ActivityPerturbation, Twin))
    args = (case.loss, case.args)
    fx.testing.assert_unbiased(right, *args, **case.options)
    with pytest.raises(AssertionError):
        fx.testing.assert_unbiased(wrong, *args, **case.options)


@pytest.mark.parametrize("name", ["positions", "layers"])
def test_replay_draws_its_own_and_is_unbiased(name):
    """The projection on the gradient, by 4,096 noises: within five standard errors, below 0.05."""
    case = CASES[name]
    rule = dataclasses.replace(AUTO, memory="replay")
    grad = fx.grad(case.loss, rule, **case.options)
    truth = jax.grad(lambda p: jnp.mean(jax.vmap(case.loss, (None, 0))(p, *case.data)))(
        jax.tree.map(jnp.asarray, case.params)
    )
    pairs = lambda g: zip(*map(jax.tree.leaves, (g, truth)), strict=True)
    along = lambda key: sum(jnp.sum(a * b) for a, b in pairs(grad(key, *case.args)))
    keys = jax.random.split(KEY, 4096)
    found = np.asarray(
        jax.jit(lambda keys: jax.lax.map(along, keys, batch_size=64))(keys)
    )
    square = float(sum(jnp.sum(b * b) for _, b in pairs(truth)))
    error = found.std() / len(found) ** 0.5 / square
    assert error < 0.05
    assert abs(found.mean() / square - 1) < 5 * error


def test_explain_names_each_sites_kind_and_scale():
    case = CASES["positions"]
    rows = fx.explain(case.loss, AUTO, **case.options)(*case.args).rows
    own = [row for row in rows if row.operation == "weight noise of each example"]
    sizes = [(row.shape, row.activity_noise) for row in own]
    assert sizes == [((C,), C), ((C,), C), ((C, 8), 8 * C)]
    assert all(row.credit == "one slope per example" for row in own)
    scales = [T**-0.5, T**-0.5, (C / T) ** 0.5]
    np.testing.assert_allclose([row.scale for row in own], scales, rtol=1e-6)
    plain = fx.explain(case.loss, **case.options)(*case.args).rows
    assert [row.operation for row in plain][:1] == ["mul + mul + add"]
    assert {row.scale for row in plain} == {None}
    scaled = fx.ActivityPerturbation(scales=(1.0, 2.0, 3.0))
    table = fx.explain(case.loss, scaled, **case.options)(*case.args)
    assert [row.scale for row in table.rows] == [1.0, 2.0, 3.0, None]
    assert [row[-1] for row in table.cells()] == ["scale", "1", "2", "3", ""]


def test_steps_of_a_loop_share_one_noise_on_their_weights():
    assert noise_at(AUTO, CASES["over_time"])["weight noise of each example"] in (2, 4)
    sites = AUTO.sites(problem_of(CASES["over_time"]))
    assert sorted(site.shape for site in sites.noisy) == [(2,), (2, 2)]


def test_what_has_an_exact_error_or_one_slope_a_position_stays_activity():
    """A slope for each position hears C coordinates, as many as a gain has."""

    def local(p, x):
        return jnp.sum(jnp.sin(jnp.tanh(x * p["gain"][None]) @ p["out"]))

    case = Program(
        local, {"gain": np.ones(C), "out": OUT}, (normal(6, N, T, C),), (None, 0)
    )
    assert not any(s.region.promoted for s in AUTO.sites(problem_of(case)).noisy)
    program = PROGRAMS["tied"]
    assert not any(s.region.promoted for s in AUTO.sites(problem_of(program)).noisy)


def test_each_shards_examples_have_their_own():
    def loss(p, x):
        return jnp.sum(
            jnp.sin(jnp.cumsum(jnp.tanh(x[:, None] * p["b"][None]), 0) @ p["v"])
        )

    problem = Signature(loss, 0, False, EACH).bind((PARAMS, normal(3, 2, 3)), {})
    rule = AUTO.basis(problem)
    assert rule.num_tangents == 4
    got, expected = sharded([rule, fx.Backprop()], loss=loss)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_bad_noise_is_named():
    with pytest.raises(ValueError, match=r"noise to be one of .*, got 'weight'"):
        fx.ActivityPerturbation(noise="weight")
