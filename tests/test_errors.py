"""Errors say what was expected, what came, and what to do: their text is the contract."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx

KEY = jax.random.key(0)
W = jnp.array([1.0, 2.0, 3.0])


def square(w, *rest):
    return jnp.sum(w**2)


def says(error, *parts):
    """`pytest.raises` for a text that holds all parts in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


# --- the key ---


@pytest.mark.parametrize("verb", [fx.value_and_grad, fx.grad])
def test_a_missing_key_is_named(verb):
    with says(
        TypeError,
        "the first argument must be a PRNG key, got float32[3]",
        "f(jax.random.key(0), *args)",
    ):
        verb(square)(W)
    with says(TypeError, "the first argument must be a PRNG key, got dict"):
        verb(square)({"w": W}, W)


@pytest.mark.parametrize(
    "bad",
    [0, None, W[0], np.zeros(2, np.int32), jnp.zeros((3, 2), jnp.uint32)],
    ids=str,
)
def test_what_is_not_a_key_is_refused(bad):
    with says(TypeError, "value_and_grad: the first argument must be a PRNG key, got"):
        fx.value_and_grad(square)(bad, W)


def test_keys_of_other_functions_are_named():
    with says(
        TypeError,
        "random_feedback: the first argument must be a PRNG key, got dict",
        "(jax.random.key(0), pa",
    ):
        fx.random_feedback({"w": W}, KEY)
    with says(
        TypeError,
        "Tangents.sample: the first argument must be a PRNG key, got int",
        "(jax.random.key(0), like)",
    ):
        fx.tangents.Rademacher().sample(0, W)
    with says(
        TypeError,
        "Momentum.init: the first argument must be a PRNG key, got WeightPerturbation",
    ):
        fx.Momentum().init(fx.WeightPerturbation(), KEY)
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w)
    with says(
        TypeError,
        "DirectFeedbackAlignment: feedback must be a PRNG key, got float32[3]",
        "maps as a tuple",
    ):
        fx.grad(loss, fx.DirectFeedbackAlignment(W))(KEY, jnp.eye(3), W)


def test_an_array_of_keys_is_refused():
    with says(
        TypeError, "expected one PRNG key", "an array of keys of shape (2,)", "jax.vmap"
    ):
        fx.grad(square)(jax.random.split(KEY, 2), W)


# --- the loss and the rule ---


def test_what_is_not_a_function_is_refused():
    with says(TypeError, "expected a function as the loss, got ArrayImpl"):
        fx.value_and_grad(W)


@pytest.mark.parametrize(
    "bad", [0, (0, 1), None, fx.tangents.Rademacher(), fx.WeightPerturbation], ids=repr
)
def test_what_is_not_a_rule_is_refused(bad):
    """Such as `argnums`, which JAX takes in this place."""
    with says(
        TypeError,
        "expected a rule, such as forwax.WeightPerturbation(), got",
        "are keyword arguments",
    ):
        fx.value_and_grad(square, bad)


def test_other_verbs_check_them_too_and_say_their_own_name():
    for verb in (
        lambda f: fx.update(f, learning_rate=1.0),
        fx.explain,
        fx.FDFA().init,
        fx.Safe(fx.Exact()).step,
    ):
        with says(TypeError, "expected a function as the loss, got int"):
            verb(3)
    with says(
        TypeError,
        "explain: expected a rule, such as",
        "got (None, 0)",
        "are keyword arguments",
    ):
        fx.explain(square, (None, 0))
    with says(
        TypeError,
        "update: argnums=0 needs at least 1 positional arguments after the key",
        "f(key, *args)",
    ):
        fx.update(square, learning_rate=1.0)(KEY)
    with says(
        TypeError,
        "explain: argnums=0 needs at least 1 positional arguments, got 0",
        "f(*args)",
    ):
        fx.explain(square)()
    with says(
        TypeError,
        "FDFA.init: argnums=0 needs at least 1 positional arguments, got 0",
        "f(*args)",
    ):
        fx.FDFA().init(square)()


@pytest.mark.parametrize(
    "verb", [fx.grad, lambda f: fx.update(f, learning_rate=1.0)], ids=["grad", "update"]
)
def test_an_error_of_the_loss_is_not_its_own_cause(verb):
    def wrong(w):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as found:
        verb(wrong)(KEY, W)
    assert found.value.__cause__ is None


@pytest.mark.parametrize(
    "rule",
    [fx.WeightPerturbation(), fx.Exact(), fx.FiniteDifference(), fx.Backprop()],
    ids=repr,
)
class TestOutputs:
    """What a loss returned."""

    def test_a_vector(self, rule):
        with says(
            TypeError,
            "scalar-output functions",
            "shape: (3,)",
            "forwax.LocalLosses(tree)",
            "has_aux=True",
        ):
            fx.grad(lambda w: w**2, rule)(KEY, W)

    def test_a_pair_without_has_aux(self, rule):
        with says(
            TypeError,
            "scalar-output functions",
            "a tuple of length 2",
            "LocalLosses",
            "has_aux=True",
        ):
            fx.grad(lambda w: (jnp.sum(w), w), rule)(KEY, W)

    def test_a_complex_loss(self, rule):
        with says(
            TypeError, "requires real-valued outputs", "complex64", "jnp.abs(z)**2"
        ):
            fx.grad(lambda w: jax.lax.complex(jnp.sum(w), jnp.sum(w)), rule)(KEY, W)

    def test_an_integer_loss(self, rule):
        with says(TypeError, "requires real-valued outputs", "int32"):
            fx.grad(lambda w: jnp.sum(w > 0), rule)(KEY, W)

    def test_no_pair_with_has_aux(self, rule):
        with says(
            TypeError,
            "has_aux=True: expected",
            "a pair (loss, aux), got a tuple of length 3",
            "drop has_aux",
        ):
            fx.grad(lambda w: (jnp.sum(w), w, w), rule, has_aux=True)(KEY, W)

    def test_a_vector_per_example(self, rule):
        with says(TypeError, "scalar-output functions", "shape: (3,)"):
            fx.grad(lambda w, x: w * x, rule, in_axes=(None, 0))(KEY, W, jnp.ones(4))


def test_other_outputs():
    with says(TypeError, "scalar-output functions", "type: NoneType"):
        fx.grad(lambda w: None)(KEY, W)
    with says(TypeError, "a pair (loss, aux), got ", "Return a pair"):
        fx.grad(square, has_aux=True)(KEY, W)
    with says(TypeError, "LocalLosses: expected at least one array, got an empty tree"):
        fx.grad(lambda w: fx.LocalLosses({}))(KEY, W)
    with says(TypeError, "requires real-valued outputs", "complex64"):
        fx.grad(lambda w: fx.LocalLosses([jnp.sum(w), jax.lax.complex(w, w)]))(KEY, W)


def test_jax_rejects_what_forwax_rejects():
    """The texts begin as JAX's do, so that a search finds them."""
    for bad, text in [
        (
            lambda w: w**2,
            "Gradient only defined for scalar-output functions. Output had shape: (3,)",
        ),
        (
            lambda w: jax.lax.complex(jnp.sum(w), jnp.sum(w)),
            "requires real-valued outputs (output dtype that is a sub-dtype of np.floating)",
        ),
    ]:
        for call in (
            lambda bad=bad: jax.grad(bad)(W),
            lambda bad=bad: fx.grad(bad)(KEY, W),
        ):
            with says(TypeError, text):
                call()


# --- the arguments ---


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"w": W, "steps": jnp.arange(3)}, "int32[3] at ['steps']"),
        ((W, True), "bool at [1]"),
        (np.arange(2), "int64[2] at the argument itself"),
        ({"name": "layer"}, "str at ['name']"),
        ([W, KEY], "key<fry>[] at [1]"),
    ],
    ids=["integer", "bool", "numpy", "string", "key"],
)
def test_leaves_that_cannot_be_differentiated(params, what):
    text = (
        "requires real- or complex-valued inputs",
        what,
        "eqx.partition",
        "nnx.split",
    )
    for rule in (fx.WeightPerturbation(), fx.Backprop()):
        with says(TypeError, *text):
            fx.grad(lambda p: jnp.zeros(()), rule)(KEY, params)


@pytest.mark.parametrize(("argnums", "needed"), [(2, 3), ((0, 3), 4), (-3, 3)])
def test_argnums_out_of_range(argnums, needed):
    with says(
        TypeError,
        f"argnums={argnums} needs at least {needed} positional arguments",
        "got 2",
        "f(key, *args)",
    ):
        fx.grad(square, argnums=argnums)(KEY, W, W)


@pytest.mark.parametrize("argnums", [(0, 0), (0, 1, -2)])
def test_argnums_that_name_an_argument_twice(argnums):
    with says(
        ValueError,
        "expected each argument once in argnums",
        f"got {argnums} for 2 arguments",
    ):
        fx.grad(square, argnums=argnums)(KEY, W, W)


def test_no_arguments():
    with says(
        TypeError,
        "argnums=0 needs at least 1 positional arguments after the key, got 0",
    ):
        fx.grad(square)(KEY)


# --- in_axes ---


@pytest.mark.parametrize("in_axes", [(0, 0), 0, ({"w": 0}, None)], ids=str)
def test_a_mapped_parameter(in_axes):
    params = (
        {"w": W} if isinstance(in_axes, tuple) and isinstance(in_axes[0], dict) else W
    )
    with says(
        ValueError,
        "in_axes maps argument 0, which is differentiated",
        "in_axes=(None, 0, 0)",
    ):
        fx.grad(square, in_axes=in_axes)(KEY, params, W)


def test_the_length_of_in_axes():
    with says(
        ValueError,
        "one entry for each positional argument",
        "expected 3, got 2",
        "Keyword arguments are not",
    ):
        fx.grad(square, in_axes=(None, 0))(KEY, W, W, W)


def test_in_axes_that_map_nothing():
    with says(ValueError, "in_axes=(None, None) maps no argument", "Pass in_axes=None"):
        fx.grad(square, in_axes=(None, None))(KEY, W, W)


@pytest.mark.parametrize(
    ("in_axes", "batch", "what"),
    [
        ((None, 0), jnp.zeros((0, 3)), "shape (0, 3) mapped along axis 0"),
        ((None, 1), jnp.zeros((3, 0)), "shape (3, 0) mapped along axis 1"),
        ((None, -1), jnp.zeros((3, 0)), "shape (3, 0) mapped along axis -1"),
        (
            (None, {"x": 0, "y": None}),
            {"x": jnp.zeros((0, 2)), "y": W},
            "shape (0, 2) mapped along axis 0",
        ),
    ],
    ids=["first", "second", "last", "tree"],
)
def test_an_empty_batch(in_axes, batch, what):
    with says(ValueError, "expected at least one example, got an empty batch", what):
        fx.grad(square, in_axes=in_axes)(KEY, W, batch)


@pytest.mark.parametrize(
    "rule",
    [fx.WeightPerturbation(), fx.ActivityPerturbation()],
    ids=["weight", "activity"],
)
@pytest.mark.parametrize(("axis", "arg"), [(0, 2.0), (1, W), (-2, W)])
def test_an_axis_that_an_argument_does_not_have(rule, axis, arg):
    with says(
        ValueError,
        f"have the axis {axis} along which",
        f"of shape {jnp.shape(arg)}",
        "Write None",
    ):
        fx.grad(square, rule, in_axes=(None, axis))(KEY, W, arg)


def test_a_batch_of_unequal_lengths_gets_jaxs_own_error():
    with says(ValueError, "vmap got inconsistent sizes for array axes to be mapped"):
        fx.grad(square, in_axes=(None, 0, 0))(
            KEY, W, jnp.zeros((2, 1)), jnp.zeros((3, 1))
        )


# --- tangents and combinations ---


@pytest.mark.parametrize(
    "rule", [fx.WeightPerturbation, fx.FiniteDifference], ids=lambda rule: rule.__name__
)
class TestDirections:
    """What a distribution cannot draw."""

    @pytest.mark.parametrize(
        ("tangents", "name"),
        [
            (fx.tangents.Orthonormal(), "Orthonormal()"),
            (fx.tangents.Hadamard(), "Hadamard()"),
            (fx.tangents.Coordinate(replace=False), "Coordinate(replace=False)"),
            (fx.tangents.Guided(W), "Guided(guess)"),
        ],
        ids=["orthonormal", "hadamard", "coordinates", "guided"],
    )
    def test_more_directions_than_coordinates(self, rule, tangents, name):
        what = (
            f"tangents.{name} draws at most n = 3 directions for 3 real coordinates, "
            f"got "
            f"num_tangents=4"
        )
        with says(
            ValueError, what, "With num_tangents=3 the gradient is exact already"
        ):
            fx.grad(square, rule(tangents, 4))(KEY, W)

    def test_the_guess_alone(self, rule):
        with says(
            ValueError, "tangents.Guided needs num_tangents >= 2", "got num_tangents=1"
        ):
            fx.grad(square, rule(fx.tangents.Guided(W)))(KEY, W)

    @pytest.mark.parametrize(
        "guess",
        [W[:2], {"w": W, "b": W}, (), jnp.ones((3, 1))],
        ids=["short", "more", "none", "rank"],
    )
    def test_a_guess_of_another_structure(self, rule, guess):
        with says(
            ValueError,
            "tangents.Guided: the guess must have the parameters' structure",
            "[(3,)]",
            "got",
        ):
            fx.grad(square, rule(fx.tangents.Guided(guess), 2))(KEY, W)
        with says(
            ValueError,
            "combine.ControlVariate: the guess must have the parameters' structure",
            "[(3,)]",
            "got",
        ):
            fx.grad(square, rule(combine=fx.combine.ControlVariate(guess)))(KEY, W)


DRAWING = [fx.WeightPerturbation, fx.FiniteDifference, fx.ActivityPerturbation]


@pytest.mark.parametrize("rule", DRAWING, ids=lambda rule: rule.__name__)
def test_fields_of_another_kind(rule):
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w)
    for bad in (8, fx.tangents.Rademacher):
        with says(
            TypeError,
            f"{rule.__name__}: expected tangents such as forwax.tangents.Rademacher(), got {bad!r}",
        ):
            fx.grad(loss, rule(bad))(KEY, jnp.eye(3), W)
    with says(
        TypeError,
        f"{rule.__name__}: expected combine such as forwax.combine.Mean(), got {fx.combine.Mean!r}",
    ):
        fx.grad(loss, rule(combine=fx.combine.Mean))(KEY, jnp.eye(3), W)


OWN = fx.tangents.LowRank(per_example=True)


@pytest.mark.parametrize(
    "rule",
    [fx.FiniteDifference(OWN), fx.ActivityPerturbation(OWN), fx.FDFA(tangents=OWN)],
    ids=str,
)
def test_directions_of_single_examples_in_other_rules(rule):
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w)
    call = (
        rule.step(loss, in_axes=(None, 0))
        if isinstance(rule, fx.FDFA)
        else fx.grad(loss, rule, in_axes=(None, 0))
    )
    with says(
        ValueError,
        f"{type(rule).__name__}: expected tangents without per_example=True",
        "or per_example=False",
    ):
        call(KEY, jnp.eye(3), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    "combination", [fx.combine.Projection(), fx.combine.Shrinkage()], ids=str
)
def test_directions_of_single_examples_that_are_combined(combination):
    rule = fx.WeightPerturbation(OWN, 2, combination)
    name = type(combination).__name__
    with says(
        ValueError,
        "gives each example its own slopes: expected combine.Mean()",
        f"got {name}",
    ):
        fx.grad(lambda w, x: jnp.sum(x @ w), rule, in_axes=(None, 0))(
            KEY, jnp.eye(3), jnp.ones((2, 3))
        )


def test_directions_of_single_examples_of_sharded_parameters():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.sharding.PartitionSpec("data")
    grad = fx.grad(
        lambda w, x: jnp.sum(x @ w), fx.WeightPerturbation(OWN), in_axes=(None, 0)
    )
    run = jax.shard_map(
        lambda w: grad(KEY, w, jnp.ones((2, 2))),
        mesh=mesh,
        in_specs=data,
        out_specs=data,
    )
    with says(
        ValueError, "needs whole parameters on every device", "per_example=False"
    ):
        run(jnp.ones((4, 3)))


def test_laws_that_do_not_exist():
    with says(
        ValueError,
        "Orthonormal() draws at most n = 100 directions",
        "got num_tangents=200",
    ):
        fx.suggest_learning_rate(
            fx.FiniteDifference(fx.tangents.Orthonormal(), 200), 100, 1.0
        )
    with says(
        ValueError,
        "Orthonormal() draws at most n = 100 directions",
        "got num_tangents=200",
    ):
        fx.WeightPerturbation(fx.tangents.Orthonormal(), 200).relative_mse(100)
    with says(
        ValueError,
        "expected a rule whose law follows from n alone, got WeightPerturbation(",
        "forwax.diagnose",
    ):
        fx.suggest_learning_rate(fx.WeightPerturbation(OWN), 100, 1.0)


@pytest.mark.parametrize(("dtype", "epsilon"), [("bfloat16", 5e-3), ("float16", 5e-4)])
def test_steps_that_parameters_would_not_take(dtype, epsilon):
    params = [jnp.ones(2), jnp.ones(3, dtype)]
    least = float(jnp.finfo(dtype).eps)
    text = (
        f"expected epsilon of at least {least} for parameters in {dtype}",
        f"got {epsilon}",
        "in float32",
    )
    with says(ValueError, *text):
        fx.grad(lambda p: jnp.sum(p[0]), fx.FiniteDifference(epsilon=epsilon))(
            KEY, params
        )


def test_as_many_directions_as_coordinates_are_exact():
    """What the error promises; complex entries count twice."""
    z = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    loss = lambda z: jnp.sum(jnp.abs(z) ** 2)
    for tangents in (
        fx.tangents.Orthonormal(),
        fx.tangents.Coordinate(replace=False),
        fx.tangents.Guided(z),
    ):
        got = jax.jit(fx.grad(loss, fx.WeightPerturbation(tangents, 4)))(KEY, z)
        np.testing.assert_allclose(got, jax.grad(loss)(z), rtol=1e-4)
        with says(ValueError, "at most n = 4 directions"):
            fx.grad(loss, fx.WeightPerturbation(tangents, 5))(KEY, z)


def test_the_projection_survives_dependent_directions():
    """K > n, duplicates: finite, and the gradient itself once the span is everything."""
    rule = fx.WeightPerturbation(fx.tangents.Rademacher(), 12, fx.combine.Projection())
    np.testing.assert_allclose(jax.jit(fx.grad(square, rule))(KEY, W), 2 * W, rtol=1e-3)
    twice = fx.WeightPerturbation(fx.tangents.Coordinate(), 8, fx.combine.Projection())
    got = np.asarray(jax.jit(fx.grad(square, twice))(KEY, W))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[got != 0], 2 * np.asarray(W)[got != 0], rtol=1e-3)
    zeros = fx.WeightPerturbation(fx.tangents.Sparse(0.01), 4, fx.combine.Projection())
    assert np.isfinite(np.asarray(jax.jit(fx.grad(square, zeros))(KEY, W))).all()


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_a_useless_guess_is_replaced(bad):
    """A zero guess, as in a run's first step, or one that is not finite: still exact at k = n."""
    rule = fx.WeightPerturbation(fx.tangents.Guided(W * bad), 3)
    np.testing.assert_allclose(jax.jit(fx.grad(square, rule))(KEY, W), 2 * W, rtol=1e-3)
