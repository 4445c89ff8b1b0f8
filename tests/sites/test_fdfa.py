"""Learnt direct feedback: its maps are the outputs' Jacobians, and with them it is backprop."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax._signature import Signature
from sites.programs import PROGRAMS, normal

KEY = jax.random.key(0)
EACH = (None, 0)
PARAMS = {
    "w": normal(0, 3, 4),
    "b": normal(1, 4),
    "v": normal(2, 4, 4),
    "u": normal(8, 4, 4),
    "o": normal(3, 4, 2),
}
X = normal(4, 8, 3)


def linear(p, x):
    return jnp.sum(jnp.sin((((x @ p["w"] + p["b"]) @ p["v"]) @ p["u"]) @ p["o"]))


def mlp(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"])
    return jnp.sum(jnp.sin(jnp.tanh(h @ p["u"]) @ p["o"]))


def listed(loss, args, in_axes):
    """The rule that forgets all and takes each coordinate of the noise once.

    Its maps are exact after one step.
    """
    n = (
        fx.LearnedFeedback(correction=True)
        .basis(Signature(loss, 0, False, in_axes).bind(args, {}))
        .num_tangents
    )
    return fx.FDFA(
        decay=0.0, tangents=fx.tangents.Coordinate(replace=False), num_tangents=n
    )


def assert_close(got, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))) + 1e-6
        )


def cosine(left, right):
    a, b = (
        jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (left, right)
    )
    return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))


EXACT = [
    "convolutions",
    "gated_recurrent",
    "scan_over_layers",
    "local_losses",
    "complex_activities",
]


@pytest.mark.parametrize("name", EXACT)
def test_with_exact_maps_one_example_gets_its_gradient(name):
    """Through loops, look-ups, convolutions and complex values.

    All errors come straight from the outputs.
    """
    program = PROGRAMS[name]
    args = (program.params, *(x[:1] for x in program.data))
    rule = listed(program.loss, args, program.in_axes)

    def both(args):
        value, grads, _ = rule.step(program.loss, **program.options)(KEY, *args)
        return (value, grads), fx.value_and_grad(
            program.loss, fx.Backprop(), **program.options
        )(KEY, *args)

    got, expected = jax.jit(both)(args)
    assert_close(got, expected)


def test_the_maps_of_a_linear_network_are_its_jacobians():
    step = jax.jit(listed(linear, (PARAMS, X), EACH).step(linear, in_axes=EACH))
    _, grads, rule = step(KEY, PARAMS, X)
    second = PARAMS["o"].T
    assert_close(
        rule.maps, (second @ PARAMS["u"].T @ PARAMS["v"].T, second @ PARAMS["u"].T)
    )
    assert_close(grads, fx.grad(linear, fx.Backprop(), in_axes=EACH)(KEY, PARAMS, X))


def test_the_maps_are_a_running_mean_of_what_noise_shows():
    rule = fx.FDFA(decay=0.75, num_tangents=4096)
    step = jax.jit(lambda rule, key: rule.step(linear, in_axes=EACH)(key, PARAMS, X)[2])
    first = step(rule, KEY)
    second = step(first, jax.random.key(1))
    jacobian = PARAMS["o"].T @ PARAMS["u"].T @ PARAMS["v"].T
    spread = 5 * float(jnp.linalg.norm(jacobian)) * 3 / math.sqrt(4096 * 8)
    np.testing.assert_allclose(first.maps[0], jacobian / 4, atol=spread / 4)
    np.testing.assert_allclose(second.maps[0], jacobian * 7 / 16, atol=spread / 2)


def test_learnt_maps_point_nearer_to_the_gradient_than_random_ones():
    x = normal(5, 32, 3)

    @jax.jit
    def estimates(keys):
        rule = fx.FDFA(decay=0.95).init(mlp, in_axes=EACH)(PARAMS, x)
        learn = lambda rule, key: (
            rule.step(mlp, in_axes=EACH)(key, PARAMS, x)[2],
            None,
        )
        rules = [
            fx.Backprop(),
            jax.lax.scan(learn, rule, keys)[0],
            *map(fx.DirectFeedbackAlignment, keys[:5]),
        ]
        both = [fx.grad(mlp, rule, in_axes=EACH)(KEY, PARAMS, x) for rule in rules]
        return [
            {name: grads[name] for name in "wbv"} for grads in both
        ]  # "u" and "o" are exact in all of them

    truth, learnt, *random = estimates(jax.random.split(KEY, 100))
    assert cosine(learnt, truth) > max(0.8, *(cosine(grads, truth) for grads in random))


def test_a_rule_is_an_argument_and_keeps_its_form():
    calls = []

    def counted(p, x):
        calls.append(1)
        return mlp(p, x)

    rule = fx.FDFA(num_tangents=2).init(counted, in_axes=EACH)(PARAMS, X)
    assert [m.shape for m in rule.maps] == [(2, 4), (2, 4)]
    calls.clear()

    @jax.jit
    def train(rule, keys):
        def body(rule, key):
            value, _, rule = rule.step(counted, in_axes=EACH)(key, PARAMS, X)
            return rule, value

        return jax.lax.scan(body, rule, keys)

    new, values = train(rule, jax.random.split(KEY, 3))
    train(new, jax.random.split(KEY, 3))
    assert len(calls) == 1
    assert jax.tree.structure(new) == jax.tree.structure(rule)
    np.testing.assert_allclose(values, np.mean([mlp(PARAMS, x) for x in X]), rtol=1e-5)


def test_value_and_grad_takes_the_maps_as_they_are():
    rule = dataclasses.replace(
        fx.FDFA(), maps=(jnp.asarray(normal(6, 2, 4)), jnp.asarray(normal(7, 2, 4)))
    )
    fx.testing.assert_contract(rule, mlp, (PARAMS, X), in_axes=EACH)
    direct = fx.DirectFeedbackAlignment(rule.maps)
    got, expected = (
        fx.value_and_grad(mlp, r, in_axes=EACH)(KEY, PARAMS, X) for r in (rule, direct)
    )
    assert_close(got, expected)


def test_aux_and_argnums():
    def loss(scale, p, x):
        return scale * mlp(p, x), {"x": x, "name": "aux"}

    step = fx.FDFA().step(loss, argnums=(1,), has_aux=True, in_axes=(None, None, 0))
    (value, aux), (grads,), _ = step(KEY, 2.0, PARAMS, X)
    assert (aux["x"].shape, aux["name"], grads["w"].shape) == ((8, 3), "aux", (3, 4))
    assert float(value) == pytest.approx(
        2 * np.mean([mlp(PARAMS, x) for x in X]), rel=1e-5
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError,
        match=r"expected maps of shapes \[\(2, 4\), \(2, 4\)\].*got None.*rule.init",
    ):
        fx.grad(mlp, fx.FDFA(), in_axes=EACH)(KEY, PARAMS, X)
    with pytest.raises(ValueError, match=r"got \[\(3, 4\)\]"):
        fx.FDFA(maps=(jnp.ones((3, 4)),)).step(mlp, in_axes=EACH)(KEY, PARAMS, X)
    with pytest.raises(ValueError, match=r"expected decay in \[0, 1\), got 1.0"):
        fx.FDFA(decay=1.0)
    with pytest.raises(ValueError, match="num_tangents to be a positive integer"):
        fx.FDFA(num_tangents=0)
    with pytest.raises(
        TypeError, match=r"FDFA.step: the first argument must be a PRNG key"
    ):
        fx.FDFA().step(mlp, in_axes=EACH)(PARAMS, X)
    sideways = lambda p, x: jnp.sum(
        jax.lax.scan(lambda h, x: (jnp.tanh(x * p + h * p), None), 0.0, x)[0]
    )
    with pytest.raises(ValueError, match="FDFA: found no output site after the mul"):
        fx.FDFA().init(sideways, in_axes=EACH)(jnp.asarray(0.5), X)


def test_its_law_is_unknown():
    rule = fx.FDFA()
    assert (rule.unbiased, rule.learning_rate_scale(3)) == (False, 1.0)
    assert math.isnan(rule.relative_mse(3))
