"""Functions with a backward rule of the user's: who takes them, who refuses them, and their JVP."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import forwax as fx
from forwax._programs.custom_rules import with_jvp
from forwax._programs.evaluate import bind
from forwax._programs.tracing import trace
from forwax._signature import Signature
from forwax._sites.find import find_sites
from helpers import norm
from sites.programs import normal

KEY = jax.random.key(0)
EACH = (None, 0, 0)


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(
    lambda v: (spike(v), v), lambda v, error: (error / (1 + 5 * jnp.abs(v)) ** 2,)
)


@jax.custom_gradient
def clipped(x):
    return 1.0 * x, lambda error: jnp.clip(error, -0.1, 0.1)


@jax.custom_gradient
def untouched(x):
    return x, lambda error: jnp.clip(error, -0.1, 0.1)


def spiking(p, trains, y, readout=clipped):
    def step(potentials, train):
        first, second = (0.9 * v for v in potentials)
        first = first + train @ p["w"]
        s = spike(first - 1)
        second = second + s @ p["v"]
        t = spike(second - 1)
        return (first - s, second - t), t

    _, spikes = lax.scan(step, (jnp.zeros(8), jnp.zeros(8)), trains)
    return jnp.sum((readout(jnp.mean(spikes, axis=0)) @ p["o"] - y) ** 2)


PARAMS = {"w": normal(0, 5, 8), "v": normal(1, 8, 8), "o": normal(2, 8, 3)}
DATA = (2 * normal(3, 4, 10, 5), normal(4, 4, 3))


def gradient(rule, loss=spiking):
    grad = jax.jit(fx.grad(loss, rule, in_axes=EACH))
    return jax.device_get(grad(KEY, PARAMS, *DATA))


def test_feedback_alignment_goes_back_by_surrogates_and_custom_gradients():
    truth = gradient(fx.Backprop())
    own = gradient(fx.FeedbackAlignment(PARAMS))
    for name, true in truth.items():
        assert norm(true) > 0
        assert norm(own[name] - true) <= 1e-5 * norm(true), name
    through_others = gradient(
        fx.FeedbackAlignment(fx.random_feedback(jax.random.key(1), PARAMS))
    )
    assert norm(through_others["o"] - truth["o"]) <= 1e-5 * norm(truth["o"])
    for name in "wv":
        assert norm(through_others[name] - truth[name]) > 0.1 * norm(truth[name])


def by_surrogates(p, trains, y):
    """As `spiking`, without the rule that no tangent can pass."""
    return spiking(p, trains, y, readout=lambda x: x)


def test_errors_that_are_sent_go_back_by_surrogates_and_custom_gradients():
    """Behind the last product the error is exact; before it, zero without the surrogate."""
    truth = gradient(fx.Backprop())
    learned = fx.LearnedFeedback(chain="none").init(spiking, in_axes=EACH)
    learned = with_maps_of_ones(learned(PARAMS, *DATA))
    for rule in (fx.DirectFeedbackAlignment(KEY), learned):
        sent = gradient(rule)
        assert norm(sent["o"] - truth["o"]) <= 1e-5 * norm(truth["o"])
        assert norm(sent["w"]) > 0
        assert norm(sent["v"]) > 0


def with_maps_of_ones(rule):
    maps = dataclasses.replace(
        rule.maps, direct=jax.tree.map(jnp.ones_like, rule.maps.direct)
    )
    return dataclasses.replace(rule, maps=maps)


def test_maps_learn_through_a_rule_that_can_be_transposed_and_no_other():
    rule = fx.LearnedFeedback(chain="none")
    start = rule.init(by_surrogates, in_axes=EACH)(PARAMS, *DATA)
    _, _, after = start.step(by_surrogates, in_axes=EACH)(KEY, PARAMS, *DATA)
    assert any(norm(m) > 0 for m in after.maps.direct)
    with pytest.raises(TypeError, match="custom_vjp function has no JVP"):
        rule.step(spiking, in_axes=EACH)(KEY, PARAMS, *DATA)


def test_sites_of_a_rule_that_pushes_nothing():
    problem = Signature(spiking, 0, False, EACH).bind((PARAMS, *DATA), {})
    sites = find_sites(problem, "MyRule", None, exact_outputs=True, pushes=False)
    found = [(site.shape, site.exact) for site in sites.places]
    assert found == [((10, 8), False), ((10, 8), False), ((3,), True)]


def test_a_rule_around_a_while_loop_and_a_parameter_in_it():
    @jax.custom_vjp
    def root(a, w):
        return lax.while_loop(
            lambda s: s[0] < 30, lambda s: (s[0] + 1, jnp.cos(w * s[1]) + a), (0, a)
        )[1]

    def back(residuals, error):
        z, w = residuals
        inner = error / (1 + w * jnp.sin(w * z))
        return inner, -jnp.sin(w * z) * z * inner

    root.defvjp(lambda a, w: ((z := root(a, w)), (z, w)), back)

    def loss(p, trains, y):
        return jnp.sum((root(trains[0] @ p["w"], 0.1 * p["v"][0]) @ p["o"] - y) ** 2)

    truth = gradient(fx.Backprop(), loss)
    got = gradient(fx.FeedbackAlignment(PARAMS), loss)
    for name, true in truth.items():
        assert norm(got[name] - true) <= 1e-5 * norm(true), name


@pytest.mark.parametrize(
    "rule",
    [fx.ActivityPerturbation(), fx.WeightPerturbation(num_tangents=2)],
    ids=lambda rule: type(rule).__name__,
)
def test_rules_that_push_tangents_name_the_function_and_the_ways_out(rule):
    ways_out = (
        r"Write its rule as a jax.custom_jvp; or use forwax.FeedbackAlignment or "
        r"forwax.DirectFeedbackAlignment, whose errors go back by the function's own rule; or "
        r"forwax.FiniteDifference"
    )
    with pytest.raises(TypeError, match=r"custom_vjp function spike at .*" + ways_out):
        gradient(rule)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            clipped,
            r"jax.custom_gradient function at .*\(clipped\) \(called at .*on_top",
        ),
        (untouched, r"jax.custom_gradient function \(called at .*on_top"),
    ],
)
def test_a_custom_gradient_is_named_too(function, text):
    def on_top(p, trains, y):
        return jnp.sum(function(trains[0] @ p["w"]))

    with pytest.raises(TypeError, match=text):
        gradient(fx.ActivityPerturbation(), on_top)


def with_jvps(fun):
    """The function with JVPs for its custom rules, at its top level."""

    def run(x):
        traced = trace(fun, x)
        env = dict(zip(traced.program.inputs, traced.arguments(x), strict=True))
        for equation in traced.program.equations:
            values = [
                env[v] if isinstance(v, int) else v.value for v in equation.inputs
            ]
            apply = with_jvp if equation.facts.lacks_jvp else bind
            outputs = apply(equation, values)
            env.update(zip(equation.outputs, outputs, strict=True))
        return env[traced.program.outputs[0]]

    return run


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def cross_entropy(scores, axis, labels):
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(scores, axis), labels[:, None], axis
    )
    return -picked[:, 0]


cross_entropy.defvjp(
    lambda scores, axis, labels: (
        cross_entropy(scores, axis, labels),
        (jax.nn.softmax(scores, axis), labels),
    ),
    lambda axis, kept, error: (
        error[:, None] * (kept[0] - jax.nn.one_hot(kept[1], 4)),
        np.zeros(kept[1].shape, jax.dtypes.float0),
    ),
)


@jax.custom_vjp
def pair(x):
    return jnp.sin(x), jnp.floor(x).astype(jnp.int32), jnp.sum(x * W[:1])


W = normal(9, 4, 4)
pair.defvjp(
    lambda x: (pair(x), x),
    lambda x, errors: (jnp.cos(x) * errors[0] + errors[2] * W[:1],),
)


FUNCTIONS = {
    "a surrogate": lambda x: jnp.sin(spike(x @ W) @ W),
    "an integer operand": lambda x: cross_entropy(x @ W, 1, jnp.array([0, 3, 1])),
    "an integer result": lambda x: pair(x @ W)[0] * pair(x)[2],
    "under vmap": lambda x: jax.vmap(lambda row: spike(row @ W) * row)(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_transpose_of_a_backward_rule_is_a_jvp(name):
    fun, x = FUNCTIONS[name], jnp.asarray(normal(8, 3, 4))
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(jax.jacrev(fun))(x)
        got = jax.jit(jax.jacfwd(with_jvps(fun)))(x)
        value = with_jvps(fun)(x)
        np.testing.assert_array_equal(value, fun(x))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_rule_that_is_not_linear_in_its_error_has_no_transpose():
    x = jnp.ones(3)
    np.testing.assert_array_equal(with_jvps(clipped)(x), clipped(x))
    with pytest.raises(TypeError, match=r"custom_gradient function at .*\(clipped\)"):
        jax.jvp(with_jvps(clipped), (x,), (x,))
