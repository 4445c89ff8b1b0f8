"""`forwax train`: train an experiment's model by a rule, in a folder that any interruption leaves resumable."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from forwax.lab import choices
from forwax.lab.experiments import EXPERIMENTS, describe
from forwax.lab.flags import Chosen
from forwax.lab.options import (
    ExperimentName,
    SettingOptions,
    asked,
    find_experiment,
    resolve,
)
from forwax.lab.problem import Problem, build_problem
from forwax.lab.settings import Settings, UsageError
from forwax.lab.train.advice import advice
from forwax.lab.train.checkpoints import Checkpoint, Checkpoints
from forwax.lab.train.loop import MAX_BLOCK, Block, build_trainer, init_state
from forwax.lab.train.monitor import monitored
from forwax.lab.train.progress import Reporter, make_reporter
from forwax.lab.train.runs import CHECKPOINTS, CURVES, SUMMARY, Metrics, Run, write_json
from forwax.lab.train.signals import (
    INTERRUPTED,
    NOT_FINITE,
    TERMINATED,
    Signals,
    block_size,
)
from forwax.lab.train.sitting import Sitting, make_summary, versions


@dataclass(frozen=True, kw_only=True)
class TrainOptions(SettingOptions):
    """Train a model on real data, by default without backpropagation.

    Example:
        ```sh
        forwax train                                     # digits, 64 random tangents a step
        forwax train mnist-mlp                           # the paper's MLP on MNIST, by activity noise
        forwax train mnist-mlp --config paper-fast       # as in Baydin et al. 2022
        forwax train digits --rule backprop              # the reference
        forwax train local-mixer --size M/1/16 --rule LG-FG-A  # as in Ren et al. 2023
        forwax train --resume runs/digits-20250101-120000
        ```
    """

    experiment: Annotated[ExperimentName, tyro.conf.Positional] = "digits"
    """What to train on what."""
    config: str = "default"
    """A configuration: default, paper or paper-fast (Baydin et al. 2022); for local-mixer a column of reproduce."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="")] = None
    """Go on with the run in this folder, bit for bit as if it had never stopped."""
    runs: Path = Path("runs")
    """The folder that the run's folder is made in."""
    data_dir: Chosen[Path] = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
    checkpoint_seconds: float = 5.0
    """The time between two checkpoints."""


DESCRIPTION = "\n".join(
    [
        "Train a model on real data, by default without backpropagation.",
        "",
        "Experiments, with what their defaults reached where that was measured:",
        *(f"- {describe(experiment)}" for experiment in EXPERIMENTS.values()),
        "",
        "Rules:",
        *(f"- {name}: {rule.about}" for name, rule in choices.RULES.items() if not rule.published),
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
    opened = _open(options)
    dtype = opened.config["dtype"] if opened else options.dtype
    with _precision(dtype):
        if opened is not None and opened.finished:
            print(
                f"{opened.path} is finished already: test accuracy "
                f"{opened.summary()['test_accuracy']:.1%}."
            )
            return 0
        sitting = _resume(opened, options) if opened else _start(options)
        try:
            return _train(sitting, started)
        finally:
            sitting.metrics.close()
            sitting.checkpoints.close()


def _open(options: TrainOptions) -> Run | None:
    if options.checkpoint_seconds < 0:
        raise UsageError(
            f"--checkpoint-seconds must be zero or more, got {options.checkpoint_seconds}."
        )
    if options.resume is None:
        return None
    if options.given() or options.config != "default":
        raise UsageError(
            "--resume takes every setting from the run's config.json; leave the other settings out."
        )
    return Run.open(options.resume)


def _precision(dtype: str | None) -> contextlib.AbstractContextManager[Any]:
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _start(options: TrainOptions) -> Sitting:
    """Check the options, load the data, make the folder, then compile."""
    experiment = find_experiment(options.experiment)
    problem = build_problem(
        experiment, asked(experiment, options.config, options.given()), options.data_dir
    )
    settings = resolve(
        experiment,
        options.config,
        options.given(),
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
        "versions": versions(),
    }
    run = Run.create(options.runs, experiment.name, config)
    _print_start(run, settings, problem)
    return _sitting(run, problem, settings, options, None)


def _resume(run: Run, options: TrainOptions) -> Sitting:
    """Load what the run had, cut its metrics back to its checkpoint, and compile."""
    experiment, settings = (
        find_experiment(run.config["experiment"]),
        Settings.from_dict(run.config),
    )
    stored = run.config["data_dir"]
    problem = build_problem(
        experiment, settings, options.data_dir or (Path(stored) if stored else None)
    )
    if problem.checksum != run.config["data_checksum"]:
        raise UsageError(
            f"The data set {experiment.data_set} is not the one that {run.path} was trained on "
            f"(its checksum differs); "
            "give the old one with --data-dir, or start a new run."
        )
    checkpoints = Checkpoints(run.path / CHECKPOINTS)
    checkpoint = checkpoints.restore(jax.eval_shape(lambda: init_state(problem, settings)))
    checkpoints.close()
    step = int(checkpoint.state.step) if checkpoint else 0
    run.cut_metrics(step)
    print(f"Going on with {run.path} from step {step} of {settings.steps}.", flush=True)
    return _sitting(run, problem, settings, options, checkpoint)


def _sitting(
    run: Run,
    problem: Problem,
    settings: Settings,
    options: TrainOptions,
    checkpoint: Checkpoint | None,
) -> Sitting:
    return Sitting(
        run=run,
        trainer=build_trainer(problem, settings, checkpoint.state if checkpoint else None),
        seconds=checkpoint.seconds if checkpoint else 0.0,
        checkpoints=Checkpoints(run.path / CHECKPOINTS),
        metrics=Metrics(run.path),
        checkpoint_seconds=options.checkpoint_seconds,
    )


def _train(sitting: Sitting, started: float) -> int:
    name, settings = sitting.run.config["experiment"], sitting.settings
    with Signals().watch() as signals:
        with make_reporter(name, settings.steps, sitting.trainer.step) as reporter:
            stopped_by = _run_blocks(sitting, reporter, signals)
        sitting.save()
        if stopped_by is not None:
            print(advice(sitting, stopped_by))
            return NOT_FINITE
        if sitting.trainer.step < settings.steps:
            print(
                f"Stopped at step {sitting.trainer.step} of {settings.steps}; go on with: "
                f"forwax train --resume {sitting.run.path}"
            )
            return INTERRUPTED if signals.received == signal.SIGINT else TERMINATED
        _finish(sitting, started)
    return 0


def _run_blocks(sitting: Sitting, reporter: Reporter, signals: Signals) -> float | None:
    """Run blocks until the last step, a signal, or a loss that is not finite, which is returned."""
    trainer, steps = sitting.trainer, sitting.settings.steps
    size, saved = 1, time.monotonic()
    while trainer.step < steps and signals.received is None:
        count = min(
            size,
            MAX_BLOCK,
            _next_evaluation(trainer.step, sitting.settings) - trainer.step,
        )
        before, started = trainer.step, time.perf_counter()
        block = trainer.run(count)
        seconds = time.perf_counter() - started
        _record(sitting, block, before, seconds)
        if block.stopped_by is not None:
            return block.stopped_by
        pace = count / seconds
        reporter.update(
            trainer.step,
            float(block.losses.mean()),
            float(block.accuracies.mean()),
            pace,
        )
        size = block_size(pace, size)
        if time.monotonic() - saved >= sitting.checkpoint_seconds:
            sitting.save()
            saved = time.monotonic()
    return None


def _next_evaluation(step: int, settings: Settings) -> int:
    every = settings.eval_every or settings.steps
    return min((step // every + 1) * every, settings.steps)


def _record(sitting: Sitting, block: Block, before: int, seconds: float) -> None:
    """Append a line for each step of the block, and the evaluation where the block ends at one."""
    count, trainer = len(block.losses), sitting.trainer
    sitting.metrics.append(
        {
            "step": before + i + 1,
            "loss": float(block.losses[i]),
            "accuracy": float(block.accuracies[i]),
            "seconds": round(sitting.seconds + seconds * (i + 1) / count, 6),
        }
        for i in range(count)
    )
    sitting.seconds += seconds
    if block.stopped_by is None and trainer.step == _next_evaluation(before, sitting.settings):
        loss, accuracy = trainer.evaluate()
        row = {"step": trainer.step, "test_loss": loss, "test_accuracy": accuracy}
        row |= monitored(sitting.settings, trainer.state, trainer.problem.num_parameters)
        sitting.metrics.append([row | {"seconds": round(sitting.seconds, 6)}])


def _finish(sitting: Sitting, started: float) -> None:
    """Draw the curves, write the summary (last, since it marks the run as finished), and tell the result."""
    # imported here: matplotlib takes a second that `forwax train --help` need not wait for
    from forwax.lab import style
    from forwax.lab.train import curves

    run, rows = sitting.run, sitting.run.metrics()
    summary = make_summary(sitting, rows)
    title = (
        f"{run.config['experiment']}, rule {run.config['rule']}: "
        f"{summary['test_accuracy']:.1%} on the test set"
    )
    rule = "backprop" if sitting.settings.rule == "backprop" else "forward"
    curves.save_curves(rows, title, run.path / CURVES, style.PALETTE[rule])
    write_json(run.path / SUMMARY, summary)
    _print_end(run, summary, time.perf_counter() - started)


def _print_start(run: Run, settings: Settings, problem: Problem) -> None:
    how = settings.rule
    if settings.num_tangents is not None:
        how += f", {settings.num_tangents} {settings.tangents} tangents a step"
        how += f", combined by {settings.combine}" if settings.combine else ""
    print(
        f"{run.config['experiment']}: {problem.num_parameters:,} parameters, "
        f"{len(problem.train[0]):,} examples."
    )
    if settings.clip_slopes is not None:
        how += f", clipped at {settings.clip_slopes:g} running medians"
    if settings.skip_bad_slopes:
        how += ", skipped where they are not finite"
    print(
        f"Rule: {how}. Optimizer: {settings.optimizer}, learning rate {settings.learning_rate:.3g}."
    )
    print(f"Run: {run.path}", flush=True)


def _print_end(run: Run, summary: dict[str, Any], total: float) -> None:
    print(
        f"Test accuracy {summary['test_accuracy']:.1%} after {summary['steps']:,} steps: "
        f"{summary['seconds']:.1f} s of "
        f"training at {summary['steps_per_second']:,.0f} steps/s, {total:.1f} s with loading, "
        f"compiling and evaluating."
    )
    if choices.RULES[summary["rule"]].backward:
        print(choices.RULES[summary["rule"]].backward)
    print(f"Curves, metrics and summary: {run.path}")
