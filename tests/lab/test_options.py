"""Every option builds and trains; what does not go together is refused in one sentence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwax as fx
from forwax.lab.catalogue import optimizers
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.experiments import EXPERIMENTS, Experiment
from forwax.lab.catalogue.objectives import BATCHED
from forwax.lab.catalogue.options import (
    find_configuration,
    find_experiment,
    resolve,
)
from forwax.lab.catalogue.settings import Settings
from forwax.lab.data import DataSet
from forwax.lab.flags import UsageError
from forwax.lab.options.settings import SettingOptions
from forwax.lab.training.problem import problem_of
from forwax.lab.training.step import init_state, make_step, split_seed
from forwax.models import logistic_regression, ren2023

DIGITS = EXPERIMENTS["digits"]
TINY = Experiment(
    name="tiny",
    data_set="tiny",
    model=lambda shape, classes, key: logistic_regression(9, classes, key=key),
    configurations={"default": Settings(num_tangents=2, batch_size=4)},
)


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    images, labels = (
        draw.integers(0, 255, (20, 3, 3, 1), np.uint8),
        draw.integers(0, 3, 20).astype(np.int32),
    )
    return DataSet(
        "tiny", images, labels, images[:7], labels[:7], 3, ("a", "b", "c"), 255
    )


def digits(**given):
    return resolve(DIGITS, "default", given, num_examples=1437, num_parameters=2410)


def one_step(data, **given):
    """The parameters before and after one step."""
    settings = resolve(TINY, "default", given, num_examples=20, num_parameters=30)
    problem = problem_of(data, TINY, settings)
    state, batch = init_state(problem, settings), slice(0, 4)
    after, loss, accuracy, finite = jax.jit(make_step(problem, settings))(
        state, data.train_images[batch], data.train_labels[batch]
    )
    assert bool(finite)
    assert float(loss) > 0
    assert 0 <= float(accuracy) <= 1
    assert int(after.step) == 1
    return state, after


def moved(state, after):
    before_leaves, after_leaves = (
        jax.tree.leaves(state.params),
        jax.tree.leaves(after.params),
    )
    assert all(np.isfinite(leaf).all() for leaf in after_leaves)
    return any(
        not np.array_equal(a, b)
        for a, b in zip(before_leaves, after_leaves, strict=True)
    )


@pytest.mark.parametrize(
    "rule", [name for name in choices.RULES if name not in ren2023.NAMES]
)
def test_every_rule_takes_a_step(data, rule):
    assert moved(*one_step(data, rule=rule))


@pytest.mark.parametrize("tangents", choices.TANGENTS)
def test_every_distribution_of_tangents_takes_a_step(data, tangents):
    state, after = one_step(data, tangents=tangents)
    assert moved(state, after)
    assert (after.guess is None) == (tangents != "guided")


def test_each_rule_has_tangents_of_its_own():
    assert digits().tangents == digits(rule="weight").tangents == "low-rank"
    assert (
        digits(rule="activity").tangents
        == digits(rule="finite-difference").tangents
        == "rademacher"
    )
    assert digits(rule="backprop").tangents is None
    mlp = functools.partial(
        resolve,
        find_experiment("mnist-mlp"),
        "default",
        num_examples=1000,
        num_parameters=1000,
    )
    by_default, by_weights = mlp({}, noise=lambda rule: 97), mlp({"rule": "weight"})
    assert (by_default.rule, by_default.tangents) == ("activity", "rademacher")
    assert (by_weights.rule, by_weights.tangents) == ("weight", "low-rank")


@pytest.mark.parametrize("combine", choices.COMBINES)
def test_every_combination_takes_a_step(data, combine):
    state, after = one_step(data, combine=combine)
    assert moved(state, after)
    assert (after.guess is None) == (combine != "control-variate")


@pytest.mark.parametrize(
    ("given", "library"),
    [
        (
            {"rule": "learned-feedback", "chain": "all", "every": 4, "num_tangents": 2},
            fx.LearnedFeedback(num_tangents=2, chain="all", every=4),
        ),
        ({"rule": "learned-feedback"}, fx.LearnedFeedback()),
        (
            {"rule": "activity", "noise": "auto"},
            fx.ActivityPerturbation(num_tangents=64, noise="auto"),
        ),
    ],
)
def test_options_of_a_rule_reach_it(given, library):
    built = choices.build_rule(digits(learning_rate=0.1, **given))
    assert jax.tree.structure(built) == jax.tree.structure(library)
    assert jax.tree.leaves(built) == jax.tree.leaves(library)


def test_calibrated_noise_has_the_scales_of_the_first_batch(data):
    state, after = one_step(data, rule="activity", calibrate=True, learning_rate=0.1)
    assert moved(state, after)
    settings = resolve(
        TINY, "default", {"rule": "activity", "learning_rate": 0.1}, 20, 30
    )
    problem = problem_of(data, TINY, settings)
    key = split_seed(0).init
    batch = (jnp.asarray(each[:4]) for each in problem.train)
    rule = choices.build_rule(settings).calibrate(problem.loss, **BATCHED)
    scales = rule(key, problem.init(key), *batch).scales
    np.testing.assert_allclose(state.guess, scales, rtol=1e-5)
    np.testing.assert_array_equal(after.guess, state.guess)
    assert init_state(problem, settings).guess is None


def test_clipped_slopes_are_remembered(data):
    state, after = one_step(data, clip_slopes=2.0)
    assert moved(state, after)
    assert int(after.slopes.num_steps) == 1
    assert one_step(data)[1].slopes is None


def test_slopes_are_clipped_at_one_median_or_more():
    with pytest.raises(UsageError, match=r"--clip-slopes must be at least 1, got 0\.5"):
        digits(clip_slopes=0.5)
    with pytest.raises(
        UsageError,
        match="--clip-slopes does not apply to --rule exact; it belongs to: weight",
    ):
        digits(rule="exact", clip_slopes=2.0)
    with pytest.raises(
        UsageError,
        match="--skip-bad-slopes does not apply to --rule backprop; it belongs to: weight",
    ):
        digits(rule="backprop", skip_bad_slopes=True)
    assert digits(rule="backprop").skip_bad_slopes is None


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_every_optimizer_lowers_a_bowl(optimizer):
    params = {"x": jnp.array([1.0, -2.0])}
    transformation = optimizers.build_optimizer(
        Settings(optimizer=optimizer, weight_decay=0.01, steps=20, learning_rate=0.01)
    )
    state = transformation.init(params)
    for _ in range(20):
        updates, state = transformation.update(params, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert float(jnp.vdot(params["x"], params["x"])) < 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_type_takes_a_step(data, dtype):
    with jax.enable_x64(dtype == "float64"):
        state, after = one_step(data, dtype=dtype)
        wanted = jnp.float64 if dtype == "float64" else jnp.float32
        assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(after.params))
        assert moved(state, after)


def test_the_guess_is_an_exponential_mean_of_the_estimates(data):
    state, after = one_step(
        data,
        combine="control-variate",
        guess_decay=0.75,
        optimizer="sgd",
        learning_rate=0.5,
    )
    # SGD moves by -0.5 ĝ, and the guess starts at zero
    for guess, old, new in zip(
        *map(jax.tree.leaves, (after.guess, state.params, after.params)), strict=True
    ):
        np.testing.assert_allclose(
            guess, 0.25 * (old - new) / 0.5, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("schedule", "at_start", "at_half", "at_end"),
    [
        ("constant", 1, 1, 1),
        ("cosine", 1, 0.5, 0),
        ("linear", 1, 0.5, 0),
        ("exponential", 1, 0.6065, 0.3679),
    ],
)
def test_schedules(schedule, at_start, at_half, at_end):
    rate = optimizers.build_schedule(
        Settings(schedule=schedule, decay_rate=0.01, steps=100), 2.0
    )
    for step, expected in ((0, at_start), (50, at_half), (100, at_end)):
        assert float(rate(step)) / 2 == pytest.approx(expected, abs=2e-4)


def test_warm_up_rises_to_the_rate_and_then_follows_the_schedule():
    rate = optimizers.build_schedule(
        Settings(schedule="linear", steps=30, warm_up=10), 1.0
    )
    assert [round(float(rate(step)), 3) for step in (0, 4, 9, 10, 20, 30)] == [
        0.1,
        0.5,
        1.0,
        1.0,
        0.5,
        0.0,
    ]


def test_suggested_rates():
    assert digits(rule="backprop").learning_rate == 0.5
    assert digits(rule="exact").learning_rate == 0.5
    k, d = 4, DIGITS.effective_dimension
    assert digits(num_tangents=k).learning_rate == pytest.approx(0.5 * k / (d + k - 1))
    assert digits(num_tangents=k, optimizer="momentum").learning_rate == pytest.approx(
        0.05 * k / (d + k - 1)
    )
    assert digits(num_tangents=k, optimizer="adam").learning_rate == pytest.approx(
        1e-3 * (k / (d + k - 1)) ** 0.5
    )
    # a projection is k/n of the mean, so its rate is n/k of the mean's
    projected = digits(num_tangents=k, combine="projection").learning_rate
    assert projected == pytest.approx(
        digits(num_tangents=k).learning_rate * 2410 / k, rel=2e-3
    )
    assert digits(learning_rate=0.25).learning_rate == 0.25


def test_activity_noise_counts_the_coordinates_along_which_the_loss_curves():
    experiment = find_experiment("mnist-cnn")
    options = {"num_examples": 1000, "num_parameters": 10_000}
    few, many = (
        resolve(
            experiment,
            "default",
            {"rule": "activity", "num_tangents": 1},
            **options,
            noise=lambda rule, noise=noise: noise,
        )
        for noise in (101, 90_000)
    )
    assert few.learning_rate == pytest.approx(0.01 / (1 + 100 * 4 / 64), rel=0.05)
    assert many.learning_rate == pytest.approx(0.01 / (1 + 1999 * 4 / 64), rel=0.05)


def test_settings_that_do_not_apply_are_none():
    settings = digits(rule="backprop")
    assert [getattr(settings, name) for name in choices.RULE_SETTINGS] == [None] * len(
        choices.RULE_SETTINGS
    )
    assert digits(tangents="sparse").density == 0.1
    assert digits().density is None
    assert digits().decay_rate is None


def test_epochs_become_steps():
    assert digits(epochs=2).steps == 2 * (1437 // 64)
    assert digits(epochs=0.5, batch_size=100).steps == 7
    assert digits(steps=100).eval_every == 5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0."),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0."),
        (
            {"batch_size": 1438},
            "--batch-size must be at most the 1437 examples of the training set, got 1438.",
        ),
        ({"num_tangents": 0}, "--num-tangents must be at least 1, got 0."),
        (
            {"learning_rate": -1.0},
            "--learning-rate must be a positive number, got -1.0.",
        ),
        (
            {"learning_rate": float("nan")},
            "--learning-rate must be a positive number, got nan.",
        ),
        ({"seed": -1}, "--seed must be zero or more, got -1."),
        (
            {"tangents": "sparse", "density": 1.5},
            "--density must be at most 1, got 1.5.",
        ),
        (
            {"guess_decay": 1.0, "tangents": "guided"},
            "--guess-decay must be at least 0 and below 1, got 1.0.",
        ),
        (
            {"density": 0.5},
            "--density belongs to --tangents sparse, but the tangents are low-rank.",
        ),
        (
            {"guess_decay": 0.5},
            "--guess-decay belongs to --tangents guided or --combine control-variate, and neither",
        ),
        (
            {"rule": "backprop", "num_tangents": 4},
            "--num-tangents does not apply to --rule backprop; it belongs to: weight",
        ),
        (
            {"epsilon": 0.1},
            "--epsilon does not apply to --rule weight; it belongs to: finite-difference.",
        ),
        (
            {"steps": 5, "epochs": 1},
            "--steps and --epochs both say how long to train; give one of them.",
        ),
        ({"epochs": float("nan")}, "--epochs must be a positive number, got nan."),
        ({"seed": 2**32}, "--seed must be below 2**32, got 4294967296."),
        (
            {"epochs": 0.01},
            "--epochs 0.01 gives no step; each epoch has 1437 examples.",
        ),
        (
            {"decay_rate": 0.1},
            "--decay-rate belongs to --schedule exponential, but the schedule is cosine.",
        ),
        (
            {"steps": 10, "warm_up": 10},
            "--warm-up must be shorter than the 10 steps, got 10.",
        ),
        (
            {"tangents": "orthonormal", "num_tangents": 2411},
            "at most n = 2410 directions",
        ),
        ({"tangents": "guided", "num_tangents": 1}, "needs num_tangents >= 2"),
        (
            {"rule": "backprop", "chain": "all"},
            "--chain does not apply to --rule backprop; it belongs to: learned-feedback, LF",
        ),
        (
            {"rule": "learned-feedback", "noise": "auto"},
            "--noise does not apply to --rule learned-feedback; it belongs to: activity.",
        ),
        (
            {"rule": "activity", "calibrate": True, "tangents": "guided"},
            "--calibrate does not go with --tangents guided.",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(given, sentence):
    with pytest.raises(UsageError) as caught:
        digits(**given)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names():
    with pytest.raises(
        UsageError,
        match=r"There is no experiment 'cats'; choose one of: digits, mnist-logistic",
    ):
        find_experiment("cats")
    with pytest.raises(
        UsageError,
        match=r"digits has no configuration 'paper'. Choose --config from: default.",
    ):
        find_configuration(DIGITS, "paper")
    with pytest.raises(
        UsageError,
        match=r"were not found in the paper\. Choose --config from: default\.",
    ):
        find_configuration(EXPERIMENTS["mnist-cnn"], "paper")


@pytest.mark.parametrize(
    ("name", "configuration", "rate", "steps"),
    [
        ("mnist-logistic", "paper", 1e-4, 25_000),
        ("fashion-mnist-mlp", "paper", 2e-5, 20_000),
        ("mnist-mlp", "paper-fast", 2e-4, 20_000),
    ],
)
def test_the_papers_configurations(name, configuration, rate, steps):
    settings = find_configuration(EXPERIMENTS[name], configuration)
    assert (settings.learning_rate, settings.steps, settings.batch_size) == (
        rate,
        steps,
        64,
    )
    assert (settings.tangents, settings.num_tangents, settings.combine) == (
        "normal",
        1,
        "mean",
    )
    assert (settings.schedule, settings.decay_rate, settings.optimizer) == (
        "exponential",
        1e-4,
        "sgd",
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves(name, tiny_data):
    experiment = EXPERIMENTS[name]
    for configuration in experiment.configurations:
        settings = resolve(
            experiment, configuration, {}, num_examples=50_000, num_parameters=10**6
        )
        assert settings.learning_rate is not None
        assert settings.learning_rate > 0
        assert settings.eval_every is not None


def test_options_and_settings_have_the_same_names():
    options = {field.name for field in dataclasses.fields(SettingOptions)}
    settings = {field.name for field in dataclasses.fields(Settings)}
    assert options - {"epochs"} == settings
