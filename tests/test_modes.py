"""Every rule under JAX's debugging and strict modes, in float32 and bfloat16, at a minimum too.

google-deepmind/mujoco#1349 and #1377: at a point of zero gradient no rule may divide 0 by 0. All
tests run with strict dtype promotion and rank promotion "raise"; here comes `jax_debug_nans` too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from cases import COMBINATIONS, RESIDUALS, RULES, SITE_RULES, TANGENTS

KEY = jax.random.key(0)
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
EACH = (None, 0, None)


@pytest.fixture(autouse=True)
def debug_nans():
    with jax.debug_nans(True):
        yield


def loss(p, x, factor):
    """With a factor of 0 every parameter is at a minimum."""
    return factor * jnp.mean((jnp.tanh(x @ p["w"]) @ p["o"]) ** 2)


def problem(dtype):
    params = {"w": jnp.full((3, 4), 0.25, dtype), "o": jnp.full((4, 1), 0.5, dtype)}
    return params, jax.random.normal(KEY, (6, 3), dtype)


def guess(dtype, of=1.0):
    params, _ = problem(dtype)
    return jax.tree.map(lambda x: of * x, params)


@functools.cache
def every_rule(dtype):
    """The lists of `cases`, each tangent and combination in each kind of rule."""
    kinds = {
        "weight": fx.WeightPerturbation,
        "activity": fx.ActivityPerturbation,
        "difference": lambda *args: fx.FiniteDifference(*args, epsilon=0.0625),
    }
    rules = RULES | SITE_RULES
    for kind, rule in kinds.items():
        for case in TANGENTS:
            if case.guided and kind == "activity":
                continue  # its noise is not of the parameters' shapes
            rules[f"{kind}-{case.name}"] = rule(case.make(guess(dtype)), 2)
        for name, make in COMBINATIONS.items():
            if kind == "activity" and name in ("projection", "control-variate"):
                continue  # that rule refuses it
            signs = fx.tangents.Rademacher()
            rules[f"{kind}-{name}"] = rule(signs, 2, make(guess(dtype)))
    for name in ("weight-guided", "weight-control-variate"):
        make = fx.tangents.Guided if "guided" in name else fx.combine.ControlVariate
        zero = make(guess(dtype, of=0.0))
        fields = {"tangents": zero} if "guided" in name else {"combine": zero}
        rules[f"{name}-of-zero"] = fx.WeightPerturbation(num_tangents=2, **fields)
    maps = fx.random_feedback(KEY, problem(dtype)[0])
    rules["feedback"] = fx.FeedbackAlignment(maps)
    rules["direct-feedback"] = fx.DirectFeedbackAlignment(KEY)
    return rules


# by name alone, without a program for each of their arrays
NAMES = list(jax.eval_shape(lambda: every_rule.__wrapped__(jnp.float32)))


@DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_every_rule(name, dtype):
    rule = every_rule(dtype)[name]
    params, x = problem(dtype)
    both = jax.jit(fx.value_and_grad(loss, rule, in_axes=EACH))
    for factor in (1, 0):
        value, grads = both(KEY, params, x, jnp.asarray(factor, dtype))
        assert np.isfinite(value)
        for leaf, like in zip(
            jax.tree.leaves(grads), jax.tree.leaves(params), strict=True
        ):
            assert leaf.dtype == like.dtype
            assert np.isfinite(leaf.astype(jnp.float32)).all()


def learners():
    for name in ("weight", "finite-difference", "backprop", "activity"):
        rule = (RULES | SITE_RULES)[name]
        yield f"safe-{name}", lambda *args, rule=rule: fx.Safe(rule, warm_up=1).init()
    yield "safe-anew", lambda *args: fx.Safe(fx.WeightPerturbation(num_tangents=3))
    for rule in (fx.FDFA(), fx.LearnedFeedback()):
        name = type(rule).__name__
        yield name, lambda *args, rule=rule: rule.init(loss, in_axes=EACH)(*args)
        yield (
            f"safe-{name}",
            lambda *args, rule=rule: fx.Safe(
                rule.init(loss, in_axes=EACH)(*args)
            ).init(),
        )


LEARNERS = dict(learners())


@DTYPES
@pytest.mark.parametrize("name", LEARNERS)
def test_every_rule_that_learns(name, dtype):
    params, x = problem(dtype)
    one = jnp.ones((), dtype)
    rule = LEARNERS[name](params, x, one)
    step = jax.jit(lambda rule, *args: rule.step(loss, in_axes=EACH)(*args))
    for i, factor in enumerate((1, 1, 0, 0)):
        key = jax.random.fold_in(KEY, i)
        value, grads, rule = step(rule, key, params, x, factor * one)
        assert np.isfinite(value)
        assert all(x.dtype == dtype for x in jax.tree.leaves(grads))


def updates():
    """By name the rule, the momentum, and whether both are made before the first step."""
    for case in TANGENTS:
        tangents = case.make(None)
        if tangents.drawn_twice:
            rule = fx.WeightPerturbation(tangents, 2)
            yield case.name, rule, None, True
            yield f"both-{case.name}", fx.Safe(rule, warm_up=1), fx.Momentum(), True
    rule = fx.WeightPerturbation(num_tangents=2)
    yield "safe", fx.Safe(rule), None, True
    yield "momentum", rule, fx.Momentum(), True
    yield "both-anew", fx.Safe(rule), fx.Momentum(window=3), False


UPDATES = {name: rest for name, *rest in updates()}


@DTYPES
@pytest.mark.parametrize("name", UPDATES)
def test_every_update(name, dtype):
    rule, momentum, ready = UPDATES[name]
    params, x = problem(dtype)
    if ready:
        momentum = momentum and momentum.init(KEY, rule)
        rule = rule.init() if isinstance(rule, fx.Safe) else rule

    @jax.jit
    def step(rule, momentum, *args):
        options = {"learning_rate": 0.1, "momentum": momentum, "in_axes": EACH}
        return fx.update(loss, rule, **options)(*args)

    for i, factor in enumerate((1, 0)):
        key = jax.random.fold_in(KEY, i)
        factor = jnp.asarray(factor, dtype)
        _, params, *state = step(rule, momentum, key, params, x, factor)
        if isinstance(rule, fx.Safe):
            rule = state.pop(0)
        if momentum is not None:
            momentum = state.pop(0)
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))


@DTYPES
def test_gauss_newton(dtype):
    params, x = problem(jnp.float32)
    solver = fx.GaussNewton(4).init(params)
    residuals = lambda p, x, factor: factor * (jnp.tanh(x @ p["w"]) @ p["o"])
    step = jax.jit(lambda solver, *args: solver.step(residuals)(*args))
    for factor in (1.0, 0.0):
        value, params, solver = step(solver, KEY, params, x, jnp.float32(factor))
        assert np.isfinite(value)


@DTYPES
@pytest.mark.parametrize("case", RESIDUALS, ids=lambda case: case.name)
def test_gauss_newton_on_every_program(case, dtype):
    params, *args = case.of(dtype)
    params = jax.tree.map(jnp.asarray, params)
    solver = fx.GaussNewton(2).init(params)

    @jax.jit
    def step(solver, params, factor):
        def residuals(params, *args):
            found = case.residuals(params, *args)
            return jax.tree.map(lambda r: factor.astype(r.dtype) * r, found)

        return solver.step(residuals, case.loss)(KEY, params, *args)

    for factor in (1.0, 0.0):
        value, new, solver = step(solver, params, jnp.float32(factor))
        assert np.isfinite(value)
        for leaf, like in zip(*map(jax.tree.leaves, (new, params)), strict=True):
            assert leaf.dtype == like.dtype
            assert np.isfinite(leaf.astype(jnp.complex64)).all()


def test_safe_outside_jit_and_its_monitor():
    rule = fx.Safe(fx.WeightPerturbation(num_tangents=2), warm_up=2).init()
    for i in range(4):
        key = jax.random.fold_in(KEY, i)
        _, _, rule = rule.step(lambda w: jnp.sum(w**2))(key, jnp.ones(5))
    found = rule.monitor(jnp.ones(5))
    assert all(np.isfinite(x) for x in found)
