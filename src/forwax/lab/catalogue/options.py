"""How options become the settings of a run: a configuration, then what the user named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from forwax.lab.catalogue import columns
from forwax.lab.catalogue.experiments import EXPERIMENTS, Experiment
from forwax.lab.catalogue.rules import RULES, build_rule, check_rule
from forwax.lab.catalogue.settings import Settings, fields_in
from forwax.lab.flags import UsageError, check_ranges
from forwax.lab.report import Json
from forwax.lab.terminal import meant


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
    reason = experiment.notes.get(
        name, f"{experiment.name} has no configuration {name!r}."
    )
    raise UsageError(
        f"{reason} Choose --config from: {', '.join(experiment.configurations)}."
        f"{meant(name, experiment.configurations)}"
    )


def asked(experiment: Experiment, configuration: str, given: Json) -> Settings:
    """Give the configuration with what the user named.

    A model, its loss and its data depend on nothing else.

    Args:
        experiment: one of `EXPERIMENTS`.
        configuration: the name of one of its configurations.
        given: what the user named, see `SettingOptions.given`.

    Raises:
        UsageError: when the experiment leaves no such choice open.

    >>> asked(find_experiment("local-mixer"), "default", {"size": "S/1/1", "epochs": 2}).size
    'S/1/1'
    """
    settings = replace(
        find_configuration(experiment, configuration),
        **fields_in(Settings, given),
    )
    check_open_choices(experiment, settings, given)
    return settings


def resolve(
    experiment: Experiment,
    configuration: str,
    given: Json,
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
            `Task.noise`.

    Returns:
        Settings whose learning rate, steps and evaluation interval are numbers.

    Raises:
        UsageError: when options do not go together or lie out of range.

    >>> given = {"rule": "backprop", "epochs": 2}
    >>> settings = resolve(find_experiment("digits"), "default", given, 1437, 2410)
    >>> settings.learning_rate, settings.steps, settings.tangents
    (0.5, 44, None)
    """
    settings = asked(experiment, configuration, given)
    check_numbers(settings, num_examples)
    settings = check_rule(settings, given)
    settings = _with_steps(settings, experiment, given, num_examples)
    if (
        "warm_up" not in given
    ):  # the configuration's warm-up keeps its share of the steps
        base = find_configuration(experiment, configuration)
        warm_up = base.warm_up * settings.steps // base.steps
        settings = replace(settings, warm_up=warm_up)
    rule = build_rule(settings, jnp.zeros(num_parameters))
    check_room(settings, rule, num_parameters)
    return replace(
        settings,
        eval_every=settings.eval_every or max(1, settings.steps // 20),
        learning_rate=settings.learning_rate
        or experiment.suggest_rate(settings, rule, num_parameters, noise),
    )


def _with_steps(
    settings: Settings, experiment: Experiment, given: Json, num_examples: int
) -> Settings:
    """Turn epochs into steps; an unfinished batch at an epoch's end is left out."""
    epochs = given.get("epochs")
    if epochs is None:
        if "steps" in given or not experiment.is_mixer:
            return settings
        epochs = columns.suggested(settings)[1]
    elif "steps" in given:
        raise UsageError(
            "--steps and --epochs both say how long to train; give one of them."
        )
    if not 0 < epochs < float("inf"):
        raise UsageError(f"--epochs must be a positive number, got {epochs}.")
    steps = round(epochs * (num_examples // settings.batch_size))
    if steps < 1:
        raise UsageError(
            f"--epochs {epochs:g} gives no step; each epoch has {num_examples} examples."
        )
    return replace(settings, steps=steps)


def check_open_choices(experiment: Experiment, settings: Settings, given: Json) -> None:
    """Refuse a size, data set, objective or method where the experiment leaves none open.

    Raises:
        UsageError: naming the option.

    >>> check_open_choices(find_experiment("digits"), Settings(size="M/1/16"), {"size": "M/1/16"})
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: --size belongs to local-mixer, but the experiment is digits.
    """
    rule = settings.rule
    published = RULES[rule].published
    if not experiment.is_mixer:
        closed = f"belongs to local-mixer, but the experiment is {experiment.name}."
        for name in ("size", "data", "objective", "parts", "augment"):
            if name in given:
                raise UsageError(f"--{name} {closed}")
        if published:
            raise UsageError(f"--rule {rule} says where local losses sit; it {closed}")
    elif not published:
        methods = ", ".join(name for name, choice in RULES.items() if choice.published)
        raise UsageError(
            f"{experiment.name} takes the methods of Ren et al. 2023: --rule {methods}."
        )
    if published and settings.tangents == "guided":
        raise UsageError(
            f"--tangents guided needs a guess of the gradient, which --rule {rule} does not keep."
        )


def check_numbers(settings: Settings, num_examples: int) -> None:
    """Refuse numbers that lie out of range, and batches larger than the training set.

    Raises:
        UsageError: naming the option, the range and what came.

    >>> check_numbers(Settings(batch_size=2000), num_examples=1437)
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: --batch-size must be at most the 1437 examples of the training
    set, got 2000.
    """
    check_ranges(settings)
    if settings.batch_size > num_examples:
        raise UsageError(
            f"--batch-size must be at most the {num_examples} examples of the training set, got "
            f"{settings.batch_size}."
        )


def check_room(settings: Settings, rule: Any, num_parameters: int) -> None:
    """Refuse a warm-up longer than the run, and tangents that the model has no room for.

    Raises:
        UsageError: naming the option, the range and what came.

    >>> settings = Settings(tangents="orthonormal", num_tangents=700)
    >>> check_room(settings, build_rule(settings), num_parameters=650)
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: ...700...
    """
    if settings.warm_up >= settings.steps and settings.warm_up:
        raise UsageError(
            f"--warm-up must be shorter than the {settings.steps} steps, got {settings.warm_up}."
        )
    tangents = getattr(rule, "tangents", None)
    if tangents is not None:
        try:
            tangents.check(num_parameters, settings.num_tangents)
        except ValueError as error:
            raise UsageError(str(error)) from error
