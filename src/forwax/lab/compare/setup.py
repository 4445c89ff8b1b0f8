"""A comparison made ready: its options, rules and settings, its data, its folder.

A validation part is held out of the training set.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from forwax.lab.catalogue import menu, names
from forwax.lab.catalogue.experiments import Experiment
from forwax.lab.catalogue.names import NamedRule
from forwax.lab.catalogue.options import find_experiment, resolve
from forwax.lab.catalogue.settings import Settings, fields_in
from forwax.lab.flags import UsageError, check_ranges, given
from forwax.lab.keeping.disk import check_path
from forwax.lab.keeping.folder import CONFIG, Run, changed
from forwax.lab.keeping.regular import read_object
from forwax.lab.keeping.seal import is_sound, sealed, unsealed
from forwax.lab.keeping.stored import check_stored
from forwax.lab.options.compare import CompareOptions
from forwax.lab.report import Json, versions, write_json
from forwax.lab.terminal import Shown
from forwax.lab.training.problem import Examples, Task, build_problem

PARTS = "parts"
"""The folder of the finished parts, one JSON file each."""


def resumed(options: CompareOptions, folder: Path) -> CompareOptions:
    """Give the options of the comparison in the folder that --resume names.

    Raises:
        UsageError: when other settings are given as well, or the folder holds no comparison.
    """
    if replace(options, resume=None, data_dir=None) != CompareOptions():
        raise UsageError(
            "--resume takes every setting from the comparison's config.json; leave the other "
            "settings out."
        )
    run = Run.open(folder)
    config = run.config
    if "rules" not in config or "seeds" not in config:
        raise UsageError(
            f"{folder} is the folder of a training run; go on with: forwax train --resume {folder}"
        )
    check_stored(folder / CONFIG, CompareOptions, config)
    run.check_config(lambda: _kept_config(folder))
    stored = CompareOptions(**fields_in(CompareOptions, config))
    data_dir = options.data_dir or (stored.data_dir and Path(stored.data_dir))
    return replace(stored, rules=tuple(stored.rules), data_dir=data_dir, resume=folder)


def make_folder(options: CompareOptions) -> Path:
    """Make the comparison's folder with config.json inside.

    Raises:
        UsageError: when it cannot be made, or holds a comparison already.
    """
    config = asdict(options) | {
        "versions": versions(),
        "data_dir": str(options.data_dir.absolute()) if options.data_dir else None,
        "out": None,
        "resume": None,
    }
    if config.pop("print_config"):
        raise Shown(config)
    folder = options.out
    check_path(folder or Path())
    if folder is None:
        return Run.create(Path("runs"), f"compare-{options.experiment}", config).path
    if os.path.lexists(folder / CONFIG):
        raise UsageError(
            f"{folder} holds a comparison already; choose another --out, or --resume {folder}."
        )
    write_json(folder / CONFIG, sealed(config))
    return folder


def _kept_config(folder: Path) -> Json:
    """What a finished part tells of the comparison's settings."""
    for path in sorted((folder / PARTS).glob("*.json")):
        part = read_object(path)
        if is_sound(part):
            return part[CONFIG]
    return {}


@dataclass(eq=False)
class Comparison:
    """A comparison made ready; the problem is without the validation part."""

    options: CompareOptions
    folder: Path
    problem: Task
    validation: Examples
    rules: list[NamedRule]
    settings: dict[str, Settings]

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return next(iter(self.settings.values())).steps

    @property
    def search_steps(self) -> int:
        """For how many steps each rate is tried."""
        return self.options.search_steps or self.steps


def part(folder: Path, name: str, make: Callable[..., Json], *what: Any) -> Json:
    """Give a part that an earlier sitting finished in a folder, or make it and keep it.

    Raises:
        UsageError: when the part is not what was kept.
    """
    path = folder / PARTS / f"{name}.json"
    if os.path.lexists(path):
        value = read_object(path)
        if is_sound(value) is False:
            raise changed(path, "remove it, and it is made again")
        value.pop(CONFIG, None)
        return unsealed(value)
    value = make(*what)
    config = Run.open(folder).config
    write_json(path, sealed({CONFIG: config} | value))
    return value


def make_ready(options: CompareOptions) -> Comparison:
    """Check the options, load the data, hold the validation part out, and make the folder.

    Raises:
        UsageError: when the options do not go together.
        DataError: when the data cannot be loaded.
    """
    options = resumed(options, options.resume) if options.resume else options
    check_ranges(options)
    experiment = find_experiment(options.experiment)
    by_default = menu.PAPER_LINES if options.paper else menu.DEFAULT_LINES
    rules = names.parse_all(options.rules or by_default)
    problem, validation = hold_out(
        build_problem(experiment, Settings(), options.data_dir),
        options.validation_examples,
    )
    images, labels = (each[: options.test_examples] for each in problem.test)
    problem = replace(problem, test=(images, labels))
    settings = {
        rule.name: _settings(options, experiment, rule, problem) for rule in rules
    }
    folder = options.resume or make_folder(options)
    return Comparison(options, folder, problem, validation, rules, settings)


def hold_out(problem: Task, count: int | None) -> tuple[Task, Examples]:
    """Take a validation part out of the training set, the same for all rules and seeds.

    Args:
        problem: the experiment made ready.
        count: how many examples; 2,000 by default, at most a fifth.

    Raises:
        UsageError: when that leaves nothing to train on.
    """
    images, labels = problem.train
    total = len(images)
    count = min(2000, max(1, total // 5)) if count is None else count
    if not 1 <= count < total:
        raise UsageError(
            f"--validation-examples must be from 1 to {total - 1}, got {count}."
        )
    order = np.random.default_rng(0).permutation(total)
    held, kept = (
        (images[rows], labels[rows]) for rows in map(np.sort, np.split(order, [count]))
    )
    return replace(problem, train=kept), held


def _settings(
    options: CompareOptions, experiment: Experiment, rule: NamedRule, problem: Task
) -> Settings:
    """Give the rule's settings; its rate is the paper's with --paper, else the suggested one."""
    asked = rule.given | given(options, ("steps", "batch_size"))
    if not options.paper:
        asked["learning_rate"] = None
    return resolve(
        experiment,
        options.configuration,
        asked,
        problem.num_examples,
        problem.num_parameters,
        problem.noise,
    )
