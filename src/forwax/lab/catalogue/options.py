"""The options of the command line, and how they become settings: a configuration, then what the user named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from forwax.lab.catalogue import columns, optimizers
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.experiments import EXPERIMENTS, Experiment
from forwax.lab.catalogue.settings import Settings, UsageError
from forwax.lab.flags import Chosen

if TYPE_CHECKING:
    ExperimentName = OneLossName = RuleName = TangentsName = CombineName = OptimizerName = (
        ScheduleName
    ) = str
    SizeName = DataName = str
else:
    # the names come from the tables, so that a new line there is a new choice here
    ExperimentName = Literal[tuple(EXPERIMENTS)]
    OneLossName = Literal[
        tuple(name for name, each in EXPERIMENTS.items() if each.specialise is None)
    ]
    RuleName = Literal[tuple(choices.RULES)]
    TangentsName = Literal[tuple(choices.TANGENTS)]
    CombineName = Literal[tuple(choices.COMBINES)]
    OptimizerName = Literal[tuple(optimizers.OPTIMIZERS)]
    ScheduleName = Literal[tuple(optimizers.SCHEDULES)]
    SizeName = Literal[tuple(columns.SIZES)]
    DataName = Literal["digits", "mnist", "fashion-mnist", "cifar10"]


@dataclass(frozen=True, kw_only=True)
class SettingOptions:
    """The settings that a user may name; what is left out comes from the experiment's configuration.

    >>> SettingOptions(steps=10).given()
    {'steps': 10}
    """

    rule: Chosen[RuleName] = None
    """How the gradient is found; for local-mixer a method of Ren et al. 2023 by its name there."""
    tangents: Chosen[TangentsName] = None
    """The distribution of the tangents, by default the rule's own: low-rank, hadamard or rademacher."""
    num_tangents: Chosen[int] = None
    """How many tangents each step draws; more cost more and are less noisy."""
    combine: Chosen[CombineName] = None
    """How slopes and tangents become one estimate."""
    density: Chosen[float] = None
    """The share of non-zero entries of sparse tangents (0.1)."""
    chunk_size: Chosen[int] = None
    """How many tangents are pushed forward at once; all of them by default."""
    epsilon: Chosen[float] = None
    """The step of finite differences (0.001)."""
    guess_decay: Chosen[float] = None
    """Guided tangents and control variates use an exponential mean of past estimates; this share is kept (0.9)."""
    clip_slopes: Chosen[float] = None
    """The largest slope, in medians of the last 1,001 steps': 1 stops explosions; by default nothing is clipped."""
    skip_bad_slopes: Chosen[bool] = None
    """Whether a slope that is not finite counts as zero and does not stop the run, as such a loss always does."""
    optimizer: Chosen[OptimizerName] = None
    """The optimizer."""
    learning_rate: Chosen[float] = None
    """The learning rate; by default the one that the rule's law implies."""
    backprop_rate: Chosen[float] = None
    """The rate tuned for SGD by backprop, from which the default learning rate is found."""
    schedule: Chosen[ScheduleName] = None
    """How the learning rate changes over the steps."""
    decay_rate: Chosen[float] = None
    """k of the exponential schedule: rate · exp(-k · step)."""
    warm_up: Chosen[int] = None
    """Over how many steps the rate rises from zero."""
    weight_decay: Chosen[float] = None
    """The share of each parameter taken off per unit of learning rate."""
    steps: Chosen[int] = None
    """The number of training steps."""
    epochs: Chosen[float] = None
    """The number of passes over the training set, instead of --steps."""
    batch_size: Chosen[int] = None
    """The number of examples of a step."""
    eval_every: Chosen[int] = None
    """The number of steps between two evaluations on the test set; a twentieth of all steps by default."""
    seed: Chosen[int] = None
    """The seed of the initial parameters, the data order and the tangents."""
    dtype: Chosen[Literal["float32", "bfloat16", "float16", "float64"]] = None
    """The floating type that the model computes in; half precision keeps its parameters in float32."""
    size: Chosen[SizeName] = None
    """The size of local-mixer: size, patches along a side, groups (M/1/16)."""
    data: Chosen[DataName] = None
    """The data set of local-mixer (mnist)."""
    objective: Chosen[Literal["supervised", "contrastive"]] = None
    """What local-mixer learns from: labels, or two views of each image, with a linear readout (supervised)."""
    parts: Chosen[bool] = None
    """Whether forward gradients of local-mixer get a slope for each patch and group, not one for each block (True)."""
    augment: Chosen[bool] = None
    """Whether supervised training images of local-mixer are shifted by up to 2 pixels, and flipped where coloured."""
    data_parallel: Chosen[bool] = None
    """Whether each batch is spread over all local devices."""

    def given(self) -> dict[str, Any]:
        """Give what the user named, by field; fields of subclasses are left out."""
        names = [field.name for field in dataclasses.fields(SettingOptions)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def find_experiment(name: str) -> Experiment:
    """Give the experiment of that name.

    Raises:
        UsageError: when there is none.

    >>> find_experiment("mnist-mlp").data_set
    'mnist'
    """
    if name not in EXPERIMENTS:
        raise UsageError(
            f"There is no experiment {name!r}; choose one of: {', '.join(EXPERIMENTS)}."
        )
    return EXPERIMENTS[name]


def find_configuration(experiment: Experiment, name: str) -> Settings:
    """Give the experiment's settings of that name.

    Raises:
        UsageError: when there are none, with the reason where one is known.

    >>> find_configuration(find_experiment("mnist-mlp"), "paper").learning_rate
    2e-05
    """
    if name in experiment.configurations:
        return experiment.configurations[name]
    known = ", ".join(experiment.configurations)
    reason = experiment.notes.get(name, f"{experiment.name} has no configuration {name!r}.")
    raise UsageError(f"{reason} Choose --config from: {known}.")


def asked(experiment: Experiment, configuration: str, given: dict[str, Any]) -> Settings:
    """Give the configuration with what the user named: all that a model, its loss and its data depend on.

    Args:
        experiment: one of `EXPERIMENTS`.
        configuration: the name of one of its configurations.
        given: what the user named, see `SettingOptions.given`.

    Raises:
        UsageError: when the experiment leaves no such choice open.

    >>> asked(find_experiment("local-mixer"), "default", {"size": "S/1/1", "epochs": 2}).size
    'S/1/1'
    """
    named = {name: value for name, value in given.items() if name != "epochs"}
    settings = dataclasses.replace(find_configuration(experiment, configuration), **named)
    check_open_choices(experiment, settings, given)
    return settings


def resolve(
    experiment: Experiment,
    configuration: str,
    given: dict[str, Any],
    num_examples: int,
    num_parameters: int,
    noise: Callable[[Any], int | None] = lambda rule: None,
) -> Settings:
    """Fill in every setting: the configuration, what the user named, and what follows from both.

    Args:
        experiment: one of `EXPERIMENTS`.
        configuration: the name of one of its configurations.
        given: what the user named, see `SettingOptions.given`.
        num_examples: the size of the training set.
        num_parameters: the number of parameters of the model.
        noise: from a rule to the number of its noise coordinates for one example; see
            `Problem.noise`.

    Returns:
        Settings whose learning rate, steps and evaluation interval are numbers.

    Raises:
        UsageError: when options do not go together or lie out of range.

    >>> settings = resolve(find_experiment("digits"), "default", {"rule": "backprop", "epochs": 2}, 1437, 2410)
    >>> settings.learning_rate, settings.steps, settings.tangents
    (0.5, 44, None)
    """
    settings = asked(experiment, configuration, given)
    check_ranges(settings, num_examples)
    if settings.schedule != "exponential" and "decay_rate" in given:
        raise UsageError(
            f"--decay-rate belongs to --schedule exponential, but the schedule is "
            f"{settings.schedule}."
        )
    settings = choices.check_rule(settings, given)
    settings = _with_steps(settings, experiment, given, num_examples)
    if "warm_up" not in given:  # the configuration's warm-up keeps its share of the steps
        base = find_configuration(experiment, configuration)
        settings = dataclasses.replace(
            settings, warm_up=base.warm_up * settings.steps // base.steps
        )
    check_against_parameters(settings, num_parameters)
    decay_rate = settings.decay_rate if settings.schedule == "exponential" else None
    return dataclasses.replace(
        settings,
        decay_rate=decay_rate,
        eval_every=settings.eval_every or max(1, settings.steps // 20),
        learning_rate=_learning_rate(settings, experiment, num_parameters, noise),
    )


def _learning_rate(
    settings: Settings,
    experiment: Experiment,
    num_parameters: int,
    noise: Callable[[Any], int | None],
) -> float:
    if settings.learning_rate is not None:
        return settings.learning_rate
    rule = choices.build_rule(settings, jnp.zeros(num_parameters))
    return experiment.suggest_rate(settings, rule, num_parameters, noise)


def _with_steps(
    settings: Settings, experiment: Experiment, given: dict[str, Any], num_examples: int
) -> Settings:
    """Turn epochs into steps; an unfinished batch at an epoch's end is left out."""
    if "steps" in given and "epochs" in given:
        raise UsageError("--steps and --epochs both say how long to train; give one of them.")
    epochs = given.get("epochs")
    if epochs is not None and not 0 < epochs < float("inf"):
        raise UsageError(f"--epochs must be a positive number, got {epochs}.")
    if epochs is None and "steps" not in given and experiment.suggested_epochs is not None:
        epochs = experiment.suggested_epochs(settings)
    if epochs is None:
        return settings
    steps = round(epochs * (num_examples // settings.batch_size))
    if steps < 1:
        raise UsageError(
            f"--epochs {epochs:g} gives no step; each epoch has {num_examples} examples."
        )
    return dataclasses.replace(settings, steps=steps)


def check_open_choices(experiment: Experiment, settings: Settings, given: dict[str, Any]) -> None:
    """Refuse a size, data set, objective or published method where the experiment leaves none open.

    Raises:
        UsageError: naming the option.

    >>> check_open_choices(find_experiment("digits"), Settings(size="M/1/16"), {"size": "M/1/16"})
    Traceback (most recent call last):
        ...
    forwax.lab.catalogue.settings.UsageError: --size belongs to local-mixer, but the experiment is digits.
    """
    is_open = experiment.specialise is not None
    published = choices.RULES[settings.rule].published
    for name in ("size", "data", "objective", "parts", "augment"):
        if name in given and not is_open:
            raise UsageError(
                f"--{name} belongs to local-mixer, but the experiment is {experiment.name}."
            )
    if published and not is_open:
        raise UsageError(
            f"--rule {settings.rule} says where local losses sit; it belongs to local-mixer, but "
            f"the experiment is "
            f"{experiment.name}."
        )
    if published and settings.tangents == "guided":
        raise UsageError(
            f"--tangents guided needs a guess of the gradient, which --rule {settings.rule} does "
            f"not keep."
        )
    if is_open and not published:
        methods = ", ".join(name for name, choice in choices.RULES.items() if choice.published)
        raise UsageError(
            f"{experiment.name} takes the methods of Ren et al. 2023: --rule {methods}."
        )


_AT_LEAST_ONE = ("steps", "batch_size", "num_tangents", "chunk_size", "eval_every")
_POSITIVE = ("learning_rate", "backprop_rate", "epsilon", "density")
_NOT_NEGATIVE = ("warm_up", "weight_decay", "decay_rate", "seed")


def check_ranges(settings: Settings, num_examples: int) -> None:
    """Refuse numbers that lie out of range.

    Raises:
        UsageError: naming the option, the range and what came.

    >>> check_ranges(Settings(batch_size=2000), num_examples=1437)
    Traceback (most recent call last):
        ...
    forwax.lab.catalogue.settings.UsageError: --batch-size must be at most the 1437 examples of the training
    set, got 2000.
    """
    for names, holds, wanted in (
        (_AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (_POSITIVE, lambda x: 0 < x < float("inf"), "a positive number"),
        (_NOT_NEGATIVE, lambda x: 0 <= x < float("inf"), "zero or more"),
        (("density",), lambda x: x <= 1, "at most 1"),
        (("seed",), lambda x: x < 2**32, "below 2**32"),
        (("clip_slopes",), lambda x: 1 <= x < float("inf"), "at least 1"),
        (("guess_decay",), lambda x: 0 <= x < 1, "at least 0 and below 1"),
    ):
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, got {value}.")
    if settings.batch_size > num_examples:
        raise UsageError(
            f"--batch-size must be at most the {num_examples} examples of the training set, got "
            f"{settings.batch_size}."
        )


def check_against_parameters(settings: Settings, num_parameters: int) -> None:
    """Refuse a warm-up longer than the run, and tangents that the model has no room for.

    Raises:
        UsageError: naming the option, the range and what came.

    >>> check_against_parameters(Settings(tangents="orthonormal", num_tangents=700), num_parameters=650)
    Traceback (most recent call last):
        ...
    forwax.lab.catalogue.settings.UsageError: ...700...
    """
    if settings.warm_up >= settings.steps and settings.warm_up:
        raise UsageError(
            f"--warm-up must be shorter than the {settings.steps} steps, got {settings.warm_up}."
        )
    rule = choices.build_rule(settings, jnp.zeros(num_parameters))
    tangents = getattr(rule, "tangents", None)
    if tangents is not None:
        try:
            tangents.check(num_parameters, settings.num_tangents)
        except ValueError as error:
            raise UsageError(str(error)) from error
