"""Calls that passed in silence or failed badly: each works, or gets the sentence that helps.

Where it can be known, the sentence comes when a rule or function is made, not when it is called.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax import _checks

KEY = jax.random.key(0)
W = jnp.ones((3, 2))
X = jnp.ones((4, 3))
MODES = pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eager", "jit"])
T = fx.tangents


def says(error, *parts):
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


def square(w, *rest):
    return jnp.sum(w**2)


# --- rates ---


@pytest.mark.parametrize(
    ("rate", "error"),
    [
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (lambda step: 0.1, TypeError),
        (np.ones(3), TypeError),
        (float("nan"), ValueError),
        (np.float32("inf"), ValueError),
        (-0.1, ValueError),
    ],
    ids=range(8),
)
def test_a_learning_rate_of_another_kind(rate, error):
    with says(error, "update: expected learning_rate", "got"):
        fx.update(square, learning_rate=rate)
    with says(error, "suggest_learning_rate: expected backprop_rate", "got"):
        fx.suggest_learning_rate(fx.WeightPerturbation(), 10, rate)


@pytest.mark.parametrize("rate", [0, 0.1, np.float32(0.1), np.float64(0.1)], ids=repr)
def test_rates_that_are_fine(rate):
    want = fx.update(square, learning_rate=float(rate))(KEY, W)[1]
    np.testing.assert_allclose(fx.update(square, learning_rate=rate)(KEY, W)[1], want)
    traced = jax.jit(lambda rate: fx.update(square, learning_rate=rate)(KEY, W)[1])
    np.testing.assert_allclose(traced(jnp.float32(rate)), want, rtol=1e-6)


@pytest.mark.parametrize("bad", [0.9, "heavy-ball", fx.Momentum], ids=repr)
def test_a_momentum_of_another_kind(bad):
    with says(TypeError, "update: expected momentum such as forwax.Momentum(", "got"):
        fx.update(square, learning_rate=0.1, momentum=bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: fx.Momentum(decay=x),
        lambda x: fx.FDFA(decay=x),
        lambda x: fx.LearnedFeedback(rate=x),
        lambda x: fx.Safe(fx.Exact(), clip=x),
        lambda x: fx.GaussNewton(damping=x),
        lambda x: fx.GaussNewton(step_size=x),
    ],
)
def test_text_in_place_of_a_number(make):
    with says(TypeError, "to be a number or an array, got '0.9'"):
        make("0.9")


# --- suggest_learning_rate ---


def test_what_suggest_learning_rate_counts():
    params = {"w": W, "b": jnp.ones(5, jnp.complex64)}
    rule = fx.WeightPerturbation(num_tangents=4)
    want = fx.suggest_learning_rate(rule, 16, 0.5)
    for n in (np.int64(16), jnp.int32(16), params):
        assert fx.suggest_learning_rate(rule, n, 0.5) == want
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["o"])
    params = {"w": jnp.ones((3, 4)), "o": jnp.ones((4, 1))}
    for rule, n in (
        (fx.WeightPerturbation(), 16),
        (fx.Safe(fx.WeightPerturbation()), 16),
        (fx.ActivityPerturbation(), 4),
    ):
        found = fx.explain(loss, rule, in_axes=(None, 0))(params, X)
        got = fx.suggest_learning_rate(rule, found, 0.5)
        assert got == fx.suggest_learning_rate(rule, n, 0.5)


@pytest.mark.parametrize("bad", ["16", None, 16.0, True, {}, [3]], ids=repr)
def test_what_suggest_learning_rate_cannot_count(bad):
    with says(TypeError, "expected n as an integer, the parameters, or what"):
        fx.suggest_learning_rate(fx.WeightPerturbation(), bad, 0.5)


@pytest.mark.parametrize("bad", ["weight", fx.WeightPerturbation, None], ids=repr)
def test_rules_of_another_kind(bad):
    with says(TypeError, "suggest_learning_rate: expected a rule"):
        fx.suggest_learning_rate(bad, 10, 0.5)
    with says(TypeError, "Safe: expected a rule"):
        fx.Safe(bad)


# --- argnums ---

VERBS = [
    fx.value_and_grad,
    fx.grad,
    fx.explain,
    fx.diagnose,
    fx.FDFA().init,
    fx.Safe(fx.Exact()).step,
]


@pytest.mark.parametrize("verb", VERBS, ids=range(len(VERBS)))
def test_argnums_as_in_jax(verb):
    for bad in ("p", 1.0, True, (0, "x"), None):
        with says(TypeError, "expected argnums to be an integer or a tuple", repr(bad)):
            verb(square, argnums=bad)
    for bad in ((), []):
        with says(ValueError, "expected at least one argument in argnums", repr(bad)):
            verb(square, argnums=bad)


def test_argnums_of_numpy():
    loss = lambda a, b: jnp.sum(a * b)
    for argnums in (np.int64(1), jnp.int32(1), [np.int32(1)], (-1,)):
        got = fx.grad(loss, fx.Exact(), argnums=argnums)(KEY, W, 2 * W)
        np.testing.assert_allclose(jax.tree.leaves(got)[0], W)


# --- names, classes and numbers in place of instances ---

DRAWING = [
    fx.WeightPerturbation,
    fx.FiniteDifference,
    fx.ActivityPerturbation,
    lambda tangents: fx.FDFA(tangents=tangents),
    lambda tangents: fx.LearnedFeedback(tangents=tangents),
    lambda tangents: fx.GaussNewton(4, tangents),
]


@pytest.mark.parametrize("rule", DRAWING, ids=range(6))
@pytest.mark.parametrize("bad", ["normal", 16, T.LowRank, fx.combine.Mean()], ids=repr)
def test_tangents_of_another_kind(rule, bad):
    with says(TypeError, "expected tangents such as forwax.tangents.", repr(bad)):
        rule(bad)


@pytest.mark.parametrize("rule", DRAWING[:3], ids=range(3))
@pytest.mark.parametrize("bad", ["mean", 2, fx.combine.Projection, T.Normal()])
def test_combinations_of_another_kind(rule, bad):
    with says(TypeError, "expected combine such as forwax.combine.Mean()", repr(bad)):
        rule(combine=bad)


def test_credit_of_another_kind():
    with says(TypeError, "expected credit such as forwax.credit.Decay(0.9)"):
        fx.ActivityPerturbation(credit=fx.credit.Decay)


def test_rules_can_be_taken_apart_all_the_same():
    for rule in (fx.Safe(fx.WeightPerturbation(T.Guided(W), 2)), fx.FDFA(decay=0.5)):
        spec = jax.tree.map(lambda x: object(), rule)
        assert type(spec) is type(rule)


# --- counts ---

COUNTS = {
    "num_tangents": lambda n: fx.WeightPerturbation(num_tangents=n),
    "chunk_size": lambda n: fx.WeightPerturbation(chunk_size=n),
    "difference": lambda n: fx.FiniteDifference(num_tangents=n),
    "activity": lambda n: fx.ActivityPerturbation(num_tangents=n),
    "exact": lambda n: fx.Exact(chunk_size=n),
    "fdfa": lambda n: fx.FDFA(num_tangents=n),
    "learned": lambda n: fx.LearnedFeedback(num_tangents=n, every=n),
    "safe": lambda n: fx.Safe(fx.Exact(), window=n, warm_up=n),
    "momentum": lambda n: fx.Momentum(window=n),
    "gauss-newton": lambda n: fx.GaussNewton(n, chunk_size=n),
    "rank": lambda n: T.LowRank(rank=n),
}


@pytest.mark.parametrize("make", COUNTS.values(), ids=COUNTS)
def test_counts(make):
    for n in (np.int64(4), np.uint8(4), jnp.int32(4)):
        got = make(n)
        assert got == make(4) or repr(got) == repr(make(4))
    for bad in (0, -1, 4.0, np.float32(4), "4", True, np.True_):
        with says(ValueError, "to be a positive integer, got", repr(bad)):
            make(bad)


def test_a_sweep_over_numpys_counts():
    for k in np.arange(1, 3):
        rule = fx.WeightPerturbation(num_tangents=k)
        assert np.isfinite(jax.jit(fx.grad(square, rule))(KEY, W)).all()


def test_more_tangents_than_memory_warn_and_name_the_chunks(monkeypatch):
    monkeypatch.setattr(
        "forwax._rules.weight.memory_limit", lambda: 2**32
    )  # 4 GiB, whatever runs the tests
    many = lambda **fields: fx.grad(
        square, fx.WeightPerturbation(num_tangents=10**9, **fields)
    )
    with pytest.warns(UserWarning, match=r"1,000,000,000 tangents .*chunk_size=64"):
        jax.eval_shape(many(), KEY, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(many(chunk_size=64), KEY, W)


def test_the_memory_of_the_machine():
    limit = _checks.memory_limit()
    assert limit is None or limit > 2**20


# --- losses and parameters ---

PARAMS = {"w": W, "o": jnp.ones((2, 1))}
FLOAT_RULES = {
    "weight": fx.WeightPerturbation(),
    "several": fx.WeightPerturbation(num_tangents=2, combine=fx.combine.Projection()),
    "low-rank": fx.WeightPerturbation(T.LowRank()),
    "exact": fx.Exact(),
    "difference": fx.FiniteDifference(),
    "backprop": fx.Backprop(),
    "activity": fx.ActivityPerturbation(),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "feedback": fx.FeedbackAlignment(PARAMS),
    "direct": fx.DirectFeedbackAlignment(KEY),
    "fdfa": fx.FDFA(),
    "learned": fx.LearnedFeedback(),
    "safe": fx.Safe(fx.WeightPerturbation()),
}


@MODES
@pytest.mark.parametrize("in_axes", [None, (None, 0)], ids=str)
@pytest.mark.parametrize("name", FLOAT_RULES)
def test_a_number_of_python_as_loss_has_no_gradient(mode, name, in_axes):
    """As `jax.grad` says."""
    both = fx.value_and_grad(lambda p, x: 1.5, FLOAT_RULES[name], in_axes=in_axes)
    value, grads = mode(both)(KEY, PARAMS, X)
    assert value == 1.5
    assert not any(np.any(x) for x in jax.tree.leaves(grads))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, PARAMS)


EMPTY = {"a": jnp.zeros((0, 3)), "b": jnp.ones((2, 2)), "c": jnp.zeros((2, 0))}
NOTHING = {"a": jnp.zeros((0, 3))}
TANGENTS = {
    "signs": T.Rademacher(),
    "normal": T.Normal(),
    "low-rank": T.LowRank(2),
    "sphere": T.Sphere(),
    "coordinate": T.Coordinate(),
    "coordinates": T.Coordinate(replace=False),
    "orthonormal": T.Orthonormal(),
    "hadamard": T.Hadamard(),
    "sparse": T.Sparse(0.5),
}


def with_empty_leaves(p):
    parts = [jnp.sum(x**2) for x in jax.tree.leaves(p)]
    return 1 + sum(parts)


@pytest.mark.parametrize("params", [EMPTY, NOTHING], ids=["some", "all"])
@pytest.mark.parametrize("name", [*TANGENTS, "guided"])
def test_leaves_without_entries(name, params):
    tangents = T.Guided(params) if name == "guided" else TANGENTS[name]
    for kind in (fx.WeightPerturbation, fx.FiniteDifference):
        both = jax.jit(fx.value_and_grad(with_empty_leaves, kind(tangents, 2)))
        value, grads = both(KEY, params)
        want = with_empty_leaves(params)
        np.testing.assert_allclose(value, want, rtol=1e-4)
        assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("params", [EMPTY, NOTHING], ids=["some", "all"])
def test_other_rules_take_leaves_without_entries(params):
    safe = fx.Safe(fx.WeightPerturbation()).init()
    for rule in (fx.Exact(), fx.Backprop(), safe):
        fx.grad(with_empty_leaves, rule)(KEY, params)
    safe.step(with_empty_leaves)(KEY, params)
    for tangents in (T.Rademacher(), T.LowRank()):
        rule = fx.WeightPerturbation(tangents, 2)
        momentum = fx.Momentum(window=3)
        update = fx.update(
            with_empty_leaves, rule, learning_rate=0.1, momentum=momentum
        )
        _, after, _ = jax.jit(update)(KEY, params)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, params)


class Tensor:
    """As PyTorch's: an array that is neither JAX's nor NumPy's."""

    __module__ = "torch"

    def __dlpack__(self, **options):
        raise NotImplementedError


def test_tensors_of_another_library():
    with says(
        TypeError,
        "expected arrays of JAX or NumPy, got torch.Tensor at ['w']",
        "jnp.asarray(x)",
        "jax.tree.map(jnp.asarray, params)",
    ):
        fx.grad(square)(KEY, {"w": Tensor()})


def test_rules_that_have_learnt_nothing_say_how():
    hidden = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])
    loss = lambda p, x: jnp.sum(hidden(p, x) @ p["o"])
    params = PARAMS | {"v": jnp.ones((2, 2))}
    for rule in (fx.FDFA(), fx.LearnedFeedback()):
        name = type(rule).__name__
        with says(ValueError, name, "got None", "rule.init(loss)(*args)"):
            fx.grad(loss, rule)(KEY, params, X)
