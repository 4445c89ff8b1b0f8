"""`forwax train`: train an experiment's model, in a folder that resumes after any interruption."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from forwax.lab import report
from forwax.lab.catalogue.experiments import EXPERIMENTS, describe
from forwax.lab.catalogue.options import (
    ExperimentName,
    SettingOptions,
    asked,
    find_experiment,
    resolve,
)
from forwax.lab.catalogue.rules import RULES
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import Chosen, Range, UsageError, check_ranges
from forwax.lab.training.advice import advice, monitored
from forwax.lab.training.folder import CURVES, SUMMARY, Files, Run, opened
from forwax.lab.training.problem import Problem, build_problem
from forwax.lab.training.program import Block, Scorer, build_trainer
from forwax.lab.training.progress import make_reporter
from forwax.lab.training.session import NOT_FINITE, Session


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SettingOptions):
    """Train a model on real data, by default without backpropagation.

    Example:
        ```sh
        forwax train                                     # digits, 64 random tangents a step
        forwax train mnist-mlp                           # the paper's MLP on MNIST, activity noise
        forwax train mnist-mlp --config paper-fast       # as in Baydin et al. 2022
        forwax train digits --rule backprop              # the reference
        forwax train local-mixer --size M/1/16 --rule LG-FG-A  # as in Ren et al. 2023
        forwax train --resume runs/digits-20250101-120000
        ```
    """

    experiment: Annotated[ExperimentName, tyro.conf.Positional] = "digits"
    """What to train on what."""
    config: str = "default"
    """A configuration: default, paper or paper-fast; for local-mixer a column of reproduce."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")] = None
    """Go on with the run in this folder, bit for bit as if it had never stopped."""
    runs: Path = Path("runs")
    """The folder that the run's folder is made in."""
    data_dir: Chosen[Path] = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
    checkpoint_seconds: Annotated[float, Range("zero or more", lambda x: x >= 0)] = 5.0
    """The time between two checkpoints."""


DESCRIPTION = "\n".join(
    [
        "Train a model on real data, by default without backpropagation.",
        "",
        "Experiments; docs/results/experiments.md tells what their defaults reached:",
        *(f"- {describe(experiment)}" for experiment in EXPERIMENTS.values()),
        "",
        "Rules:",
        *(f"- {name}: {rule.about}" for name, rule in RULES.items() if not rule.published),
        "",
        "Options that are left out are those of the experiment's configuration.",
    ]
)
"""What `forwax train --help` says first."""


def run(options: TrainOptions) -> int:
    """Train, and tell how it went.

    Args:
        options: the command's options.

    Returns:
        The exit code: 0 when done, 130 after Ctrl-C, 143 after a termination, 3 after a loss that
        is not finite.

    Raises:
        UsageError: when the options do not go together.
        DataError: when the data cannot be loaded.

    Example:
        ```sh
        forwax train digits --steps 2000
        ```
    """
    started = time.perf_counter()
    run = _to_resume(options)
    dtype = run.config["dtype"] if run else options.dtype
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        if run is not None and run.finished:
            accuracy = run.summary()["test_accuracy"]
            print(f"{run.path} is finished already: test accuracy {accuracy:.1%}.")
            return 0
        run, problem, settings = _resume(run, options) if run else _start(options)
        with opened(run, problem, settings) as files:
            if options.resume:
                whence = f"step {files.step} of {settings.steps}"
                print(f"Going on with {run.path} from {whence}.", flush=True)
            session = _Training(files, problem, settings)
            session.checkpoint_seconds = options.checkpoint_seconds
            with session.signals.watch():
                return _train(run, session, started)


def _to_resume(options: TrainOptions) -> Run | None:
    check_ranges(options)
    if options.resume is None:
        return None
    if options.given() or options.config != "default":
        raise UsageError(
            "--resume takes every setting from the run's config.json; leave the other settings out."
        )
    return Run.open(options.resume)


def _start(options: TrainOptions) -> tuple[Run, Problem, Settings]:
    """Check the options, load the data, make the folder."""
    experiment = find_experiment(options.experiment)
    given = options.given()
    settings = asked(experiment, options.config, given)
    problem = build_problem(experiment, settings, options.data_dir)
    settings = resolve(
        experiment,
        options.config,
        given,
        len(problem.train[0]),
        problem.num_parameters,
        problem.noise,
    )
    config = {
        "experiment": experiment.name,
        "config": options.config,
        **settings.as_dict(),
        "data_dir": str(options.data_dir.absolute()) if options.data_dir else None,
        "data_checksum": problem.checksum,
        "num_parameters": problem.num_parameters,
        "versions": report.versions(),
    }
    run = Run.create(options.runs, experiment.name, config)
    _print_start(run, settings, problem)
    return run, problem, settings


def _resume(run: Run, options: TrainOptions) -> tuple[Run, Problem, Settings]:
    """Load the settings and the data that the run had."""
    experiment = find_experiment(run.config["experiment"])
    settings = Settings.from_dict(run.config)
    stored = run.config["data_dir"]
    data_dir = options.data_dir or (Path(stored) if stored else None)
    problem = build_problem(experiment, settings, data_dir)
    if problem.checksum != run.config["data_checksum"]:
        raise UsageError(
            f"The data set {experiment.data_set} is not the one that {run.path} was trained on "
            "(its checksum differs); give the old one with --data-dir, or start a new run."
        )
    return run, problem, settings


class _Training(Session):
    """A line for each step, an evaluation every so often."""

    def __init__(self, files: Files, problem: Problem, settings: Settings):
        super().__init__(build_trainer(problem, settings, files.state), files)
        self.metrics = files.metrics
        self.score = Scorer(problem, problem.test)
        name = files.run.config["experiment"]
        self.reporter = make_reporter(name, settings.steps, files.step)

    def next_stop(self, step: int) -> int:
        every = self.settings.eval_every or self.steps
        return min((step // every + 1) * every, self.steps)

    def after_block(self, block: Block, seconds: float) -> None:
        count = len(block.losses)
        first = self.trainer.step - count + 1
        each = seconds / max(count, 1)
        before = self.seconds - seconds
        self.metrics.append(
            {
                "step": first + i,
                "loss": float(block.losses[i]),
                "accuracy": float(block.accuracies[i]),
                "seconds": round(before + each * (i + 1), 6),
            }
            for i in range(count)
        )
        if block.stopped_by is None:
            means = float(block.losses.mean()), float(block.accuracies.mean())
            self.reporter.update(self.trainer.step, *means, count / seconds)

    def at_stop(self) -> None:
        state = self.trainer.state
        loss, accuracy = self.score(state.params)
        row = {"step": self.trainer.step, "test_loss": loss, "test_accuracy": accuracy}
        row |= monitored(self.settings, state, self.problem.num_parameters)
        self.metrics.append([row | {"seconds": round(self.seconds, 6)}])


def _train(run: Run, session: _Training, started: float) -> int:
    """Train until something stops it, and say what did."""
    trainer = session.trainer
    with session.reporter:
        stopped_by = session.run()
    session.save()
    if stopped_by is not None:
        print(advice(run.config["experiment"], trainer, run.path, stopped_by))
        return NOT_FINITE
    if trainer.step < session.steps:
        print(
            f"Stopped at step {trainer.step} of {session.steps}; go on with: forwax train "
            f"--resume {run.path}"
        )
        return session.signals.code
    _finish(run, session, started)
    return 0


def _finish(run: Run, session: Session, started: float) -> None:
    """Draw the curves, write the summary, tell the result.

    The summary comes last, since it marks the run as finished.
    """
    # imported here: matplotlib takes a second that `forwax train --help` need not wait for
    from forwax.lab import style
    from forwax.lab.pictures import curves

    rows = run.metrics()
    summary = _summary(run, session, rows)
    accuracy = f"{summary['test_accuracy']:.1%}"
    rule = RULES[summary["rule"]]
    title = f"{run.config['experiment']}, rule {summary['rule']}: {accuracy} on the test set"
    colour = style.PALETTE["backprop" if summary["rule"] == "backprop" else "forward"]
    curves.save_curves(rows, title, run.path / CURVES, colour)
    report.write_json(run.path / SUMMARY, summary)
    print(
        f"Test accuracy {accuracy} after {summary['steps']:,} steps: {summary['seconds']:.1f} s of "
        f"training at {summary['steps_per_second']:,.0f} steps/s, "
        f"{time.perf_counter() - started:.1f} s with loading, compiling and evaluating."
    )
    if rule.backward:
        print(rule.backward)
    print(f"Curves, metrics and summary: {run.path}")


def _summary(run: Run, session: Session, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Gather what summary.json tells."""
    settings = session.settings
    last = [row for row in rows if "test_accuracy" in row][-1]
    losses = [row["loss"] for row in rows if "loss" in row][-100:]
    return {
        "experiment": run.config["experiment"],
        "config": run.config["config"],
        "rule": settings.rule,
        "reverse_mode": RULES[settings.rule].reverse_mode,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_loss": sum(losses) / len(losses),
        "steps": session.steps,
        "steps_per_second": session.steps / session.seconds,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        **session.facts(),
    }


def _print_start(run: Run, settings: Settings, problem: Problem) -> None:
    how = settings.rule
    if settings.num_tangents is not None:
        how += f", {settings.num_tangents} {settings.tangents} tangents a step"
        how += f", combined by {settings.combine}" if settings.combine else ""
    if settings.clip_slopes is not None:
        how += f", clipped at {settings.clip_slopes:g} running medians"
    if settings.skip_bad_slopes:
        how += ", skipped where they are not finite"
    print(
        f"{run.config['experiment']}: {problem.num_parameters:,} parameters, "
        f"{len(problem.train[0]):,} examples.\n"
        f"Rule: {how}. Optimizer: {settings.optimizer}, learning rate "
        f"{settings.learning_rate:.3g}.\n"
        f"Run: {run.path}",
        flush=True,
    )
