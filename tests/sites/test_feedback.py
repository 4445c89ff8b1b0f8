"""Feedback alignment against backprop, and against the rule written by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from helpers import estimates
from sites.programs import PROGRAMS, normal

KEY = jax.random.key(0)
REVERSIBLE = [
    "dense_from_either_side",
    "convolutions",
    "embedding",
    "weight_standardisation",
    "gated_recurrent",
]
REVERSIBLE += [
    "scan_over_layers",
    "nested_scans",
    "parameters_in_carries",
    "conditional",
    "local_losses",
]


def assert_close(got, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=rtol * float(np.max(np.abs(b))) + 1e-12
        )


@pytest.mark.parametrize("name", REVERSIBLE)
def test_with_the_true_weights_it_is_backprop(name):
    program = PROGRAMS[name]
    assert_close(
        *estimates(program, fx.FeedbackAlignment(program.params), fx.Backprop())
    )


def mlp(p, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ p["w"].T + p["b"]) @ p["v"]))


PARAMS = {"w": normal(0, 4, 3), "b": normal(1, 4), "v": normal(2, 4, 2)}


def test_errors_cross_a_layer_through_the_feedback():
    x, feedback = normal(3, 3), {"w": None, "b": None, "v": normal(4, 4, 2)}
    got = fx.grad(mlp, fx.FeedbackAlignment(feedback))(KEY, PARAMS, x)
    h = np.tanh(x @ PARAMS["w"].T + PARAMS["b"])
    error = np.cos(h @ PARAMS["v"])
    hidden = (feedback["v"] @ error) * (1 - h**2)
    assert_close(got, {"w": np.outer(hidden, x), "b": hidden, "v": np.outer(h, error)})


def test_random_feedback_keeps_the_scale_of_the_weights():
    params = {
        "w": 3 * jnp.ones((50, 40)),
        "zero": jnp.zeros((50, 25)),
        "b": jnp.ones(4),
        "none": jnp.zeros((3, 0)),
    }
    feedback = jax.jit(fx.random_feedback)(KEY, params)
    assert feedback["b"] is None
    assert feedback["none"].shape == (3, 0)
    assert float(jnp.std(feedback["w"])) == pytest.approx(3, rel=0.05)
    assert float(jnp.std(feedback["zero"])) == pytest.approx(0.2, rel=0.05)


def test_feedback_of_another_shape_is_refused():
    with pytest.raises(
        ValueError,
        match=r"expected feedback of the parameter's shape \(4,\), got \(3,\)",
    ):
        fx.grad(mlp, fx.FeedbackAlignment({**PARAMS, "b": jnp.ones(3)}))(
            KEY, PARAMS, normal(3, 3)
        )
    with pytest.raises(
        ValueError,
        match=r"expected feedback of the parameters' structure.*random_feedback",
    ):
        fx.grad(mlp, fx.FeedbackAlignment(jnp.ones(3)))(KEY, PARAMS, normal(3, 3))


def deep(p, x):
    h = jnp.tanh(x @ p["w"].T + p["b"])
    return jnp.sum(jnp.sin(jnp.tanh(h @ p["u"]) @ p["v"]))


DEEP = PARAMS | {"u": normal(5, 4, 4)}


def test_direct_feedback_sends_the_output_error_to_the_data_of_every_product():
    x, sent = normal(3, 5, 3), jnp.asarray(normal(4, 2, 4))
    rule = fx.DirectFeedbackAlignment((sent,))
    got = fx.grad(deep, rule, in_axes=(None, 0))(KEY, DEEP, x)
    h = np.tanh(x @ DEEP["w"].T + DEEP["b"])
    last = np.tanh(h @ DEEP["u"])
    error = np.cos(last @ DEEP["v"]) / 5
    before_last = (error @ DEEP["v"].T) * (1 - last**2)
    hidden = (error @ sent) * (1 - h**2)  # Nøkland: (B e) ⊙ f′(a)
    assert_close(
        got,
        {
            "w": hidden.T @ x,
            "b": hidden.sum(0),
            "u": h.T @ before_last,
            "v": last.T @ error,
        },
    )


def test_direct_feedback_of_one_hidden_layer_is_the_gradient():
    """The last product's data get their exact error: the docstring says so."""
    x = normal(3, 5, 3)
    rule = fx.DirectFeedbackAlignment(KEY)
    got = fx.grad(mlp, rule, in_axes=(None, 0))(KEY, PARAMS, x)
    assert_close(got, fx.grad(mlp, fx.Backprop(), in_axes=(None, 0))(KEY, PARAMS, x))


@pytest.mark.parametrize(
    "name",
    [
        "recurrent",
        "convolutions",
        "weight_decay",
        "local_losses",
        "while_loop",
        "conditional",
    ],
)
def test_direct_feedback_keeps_the_last_sites_exact_and_the_same_maps(name):
    program = PROGRAMS[name]
    rule, exact = (
        fx.DirectFeedbackAlignment(jax.random.key(3)),
        fx.Exact() if name == "while_loop" else fx.Backprop(),
    )

    @jax.jit
    def both(key, *args):
        return [
            fx.value_and_grad(program.loss, each, **program.options)(key, *args)
            for each in (rule, exact)
        ]

    first, true = both(KEY, *program.args)
    again, _ = both(jax.random.key(9), *program.args)
    assert_close(first, again, rtol=0)
    last = {
        "recurrent": "o",
        "convolutions": "o",
        "weight_decay": "v",
        "local_losses": "heads",
        "while_loop": "v",
    }
    if name in last:
        assert_close(first[1][last[name]], true[1][last[name]])
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(first[1]))


def test_direct_feedback_refuses_maps_that_do_not_fit():
    maps = (jnp.ones((2, 4)), jnp.ones((2, 4)))
    with pytest.raises(
        ValueError,
        match=r"expected one map for each inlet.*, 1 in all, got 2",
    ):
        fx.grad(deep, fx.DirectFeedbackAlignment(maps))(KEY, DEEP, normal(3, 3))
    with pytest.raises(
        ValueError, match=r"expected map 0 of shape \(2, 4\).*got \(3, 4\)"
    ):
        fx.grad(deep, fx.DirectFeedbackAlignment((jnp.ones((3, 4)),)))(
            KEY, DEEP, normal(3, 3)
        )


def test_their_laws_are_unknown():
    for rule in (fx.FeedbackAlignment(PARAMS), fx.DirectFeedbackAlignment(KEY)):
        assert not rule.unbiased
        assert math.isnan(rule.relative_mse(3))
        assert rule.learning_rate_scale(3) == 1
