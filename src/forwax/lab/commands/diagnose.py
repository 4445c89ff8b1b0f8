"""`forwax diagnose`: what rules give and cost on an experiment's own loss, and advice."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx
from forwax.lab.catalogue import names
from forwax.lab.catalogue.names import NamedRule
from forwax.lab.catalogue.objectives import BATCHED
from forwax.lab.catalogue.options import (
    check_numbers,
    find_experiment,
)
from forwax.lab.catalogue.rules import build_rule, initial_guess
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import check_ranges
from forwax.lab.options.diagnose import DiagnoseOptions
from forwax.lab.report import print_tables
from forwax.lab.training.problem import Task, build_problem


def run(options: DiagnoseOptions) -> int:
    """Measure and print the table.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: when options lie out of range, or a rule is unknown.

    Example:
        ```sh
        forwax diagnose digits --batch-size 256
        ```
    """
    check_ranges(options)
    named = names.parse_all(options.rules)
    experiment = find_experiment(options.experiment)
    problem = build_problem(experiment, Settings(), options.data_dir)
    size = options.batch_size or experiment.configurations["default"].batch_size
    check_numbers(Settings(batch_size=size), problem.num_examples)
    print(
        f"{experiment.name}, {size} examples, at the initial parameters of seed {options.seed}.",
        flush=True,
    )
    print_tables(measure(problem, named, size, options))
    return 0


def measure(
    problem: Task, named: list[NamedRule], size: int, options: DiagnoseOptions
) -> Any:
    """Diagnose the rules on one random batch at the initial parameters; see `forwax.diagnose`."""
    init, feedback, key = jax.random.split(jax.random.key(options.seed), 3)
    params = problem.init(init)
    chosen = np.random.default_rng(options.seed).choice(
        problem.num_examples, size, replace=False
    )
    images, labels = (jnp.asarray(each[np.sort(chosen)]) for each in problem.train)
    rules = {}
    for each in named:
        settings = Settings(**each.given)
        rule = build_rule(settings, initial_guess(settings, params, feedback))
        rules[each.about] = problem.ready(rule, params)
    diagnose = fx.diagnose(
        problem.loss, rules, **BATCHED, draws=options.draws, rounds=options.rounds
    )
    return diagnose(key, params, images, labels)
