"""A comparison made ready: its rules and their settings, its data with a validation part held out, its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forwax.lab.catalogue import named_rules
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.experiments import Experiment
from forwax.lab.catalogue.named_rules import NamedRule
from forwax.lab.catalogue.options import find_experiment, resolve
from forwax.lab.catalogue.settings import Settings, UsageError
from forwax.lab.compare.options import CompareOptions, check, make_folder, resumed
from forwax.lab.training.folder import write_json
from forwax.lab.training.problem import Problem, build_problem

PARTS = "parts"
"""The folder of the finished parts, one JSON file each."""


@dataclass(eq=False)
class Comparison:
    """A comparison made ready: its options, its folder, and the problem without the validation part."""

    options: CompareOptions
    folder: Path
    experiment: Experiment
    problem: Problem
    validation: tuple[np.ndarray, np.ndarray]
    rules: list[NamedRule]
    settings: dict[str, Settings]

    @property
    def search_steps(self) -> int:
        """For how many steps each rate is tried."""
        return self.options.search_steps or self.steps

    @property
    def configuration(self) -> str:
        """The name of the experiment's configuration."""
        return _configuration(self.options)

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return next(iter(self.settings.values())).steps

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Give a part that an earlier sitting finished, or make it and keep it."""
        path = self.folder / PARTS / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        value = make()
        path.parent.mkdir(exist_ok=True)
        write_json(path, value)
        return value


def make_ready(options: CompareOptions) -> Comparison:
    """Check the options, load the data, hold the validation part out, and make the folder.

    Raises:
        UsageError: when the options do not go together.
        DataError: when the data cannot be loaded.
    """
    options = resumed(options) if options.resume else options
    check(options)
    experiment = find_experiment(options.experiment)
    rules = named_rules.parse_all(
        options.rules or (named_rules.PAPER_RULES if options.paper else named_rules.DEFAULT_RULES)
    )
    problem = build_problem(experiment, Settings(), options.data_dir)
    problem, validation = hold_out(problem, options.validation_examples)
    images, labels = problem.test
    problem = dataclasses.replace(
        problem, test=(images[: options.test_examples], labels[: options.test_examples])
    )
    settings = {rule.name: _settings(options, experiment, rule, problem) for rule in rules}
    folder = options.resume or make_folder(options)
    return Comparison(options, folder, experiment, problem, validation, rules, settings)


def hold_out(problem: Problem, count: int | None) -> tuple[Problem, tuple[np.ndarray, np.ndarray]]:
    """Take a validation part out of the training set, the same for all rules and seeds.

    Args:
        problem: the experiment made ready.
        count: how many examples; 2,000 by default, at most a fifth.

    Raises:
        UsageError: when that leaves nothing to train on.
    """
    images, labels = problem.train
    count = min(2000, max(1, len(images) // 5)) if count is None else count
    if not 1 <= count < len(images):
        raise UsageError(f"--validation-examples must be from 1 to {len(images) - 1}, got {count}.")
    order = np.random.default_rng(0).permutation(len(images))
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    return dataclasses.replace(problem, train=(images[kept], labels[kept])), (
        images[held],
        labels[held],
    )


def _settings(
    options: CompareOptions, experiment: Experiment, rule: NamedRule, problem: Problem
) -> Settings:
    """Give the rule's settings; its learning rate is the paper's with --paper, else the suggested one."""
    given = {**rule.given}
    for name in ("steps", "batch_size"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    settings = resolve(
        experiment,
        _configuration(options),
        given,
        len(problem.train[0]),
        problem.num_parameters,
        problem.noise,
    )
    if options.paper:
        return settings
    if choices.needs_guess(settings):
        raise UsageError(
            f"{rule.name} needs a guess of the gradient, which a suggested rate cannot know."
        )
    built = choices.build_rule(settings)
    rate = experiment.suggest_rate(settings, built, problem.num_parameters, problem.noise)
    return dataclasses.replace(settings, learning_rate=rate)


def _configuration(options: CompareOptions) -> str:
    return "paper" if options.paper and options.config == "default" else options.config
