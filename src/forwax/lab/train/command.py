"""`forwax train`: train an experiment's model by a rule, in a folder that any interruption leaves resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from forwax.lab import choices, optimizers
from forwax.lab.experiments import EXPERIMENTS, describe
from forwax.lab.options import ExperimentName, SettingOptions, asked, find_experiment, resolve
from forwax.lab.problem import Problem, build_problem
from forwax.lab.settings import Settings, UsageError
from forwax.lab.train.checkpoints import Checkpoint, Checkpoints
from forwax.lab.train.loop import MAX_BLOCK, Block, Trainer, build_trainer, init_state
from forwax.lab.train.monitor import monitored
from forwax.lab.train.progress import Reporter, make_reporter
from forwax.lab.train.runs import CHECKPOINTS, CURVES, SUMMARY, Metrics, Run, write_json

BLOCK_SECONDS = 0.25
"""How long a block of steps should take, so that Ctrl-C is answered within half a second."""

INTERRUPTED, NOT_FINITE = 130, 3
"""Exit codes: stopped by Ctrl-C (a termination gives 143), stopped by a loss that is not finite."""


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
    """A named configuration of the experiment: default, paper or paper-fast (Baydin et al. 2022); for local-mixer a
    column of `forwax reproduce`."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Go on with the run in this folder, bit for bit as if it had never stopped."""
    runs: Path = Path("runs")
    """The folder that the run's folder is made in."""
    data_dir: Path | None = None
    """A folder to look for the data in first, before FORWAX_DATA and the cache."""
    checkpoint_seconds: float = 5.0
    """The time between two checkpoints."""


DESCRIPTION = "\n".join(
    [
        "Train a model on real data, by default without backpropagation.",
        "",
        "Experiments, with what their defaults reached where that was measured:",
        *(f"- {describe(experiment)}" for experiment in EXPERIMENTS.values()),
    ]
)
"""What `forwax train --help` says first."""


@dataclass(eq=False)
class Session:
    """One sitting of a run: from its start, or from its last checkpoint, to wherever it stops."""

    run: Run
    trainer: Trainer
    seconds: float
    checkpoints: Checkpoints
    metrics: Metrics
    checkpoint_seconds: float

    @property
    def settings(self) -> Settings:
        """The run's settings."""
        return self.trainer.settings

    def save(self) -> None:
        """Write a checkpoint, after the metrics that it counts on."""
        self.metrics.sync()
        self.checkpoints.save(self.trainer.state, self.seconds)


class Signals:
    """Notes Ctrl-C and termination, so that the loop can stop between two blocks; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Signals]:
        """Watch while the context lasts; outside the main thread there is nothing to watch."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(options: TrainOptions) -> int:
    """Train, and tell how it went.

    Args:
        options: the command's options.

    Returns:
        The exit code: 0 when done, 130 after Ctrl-C, 143 after a termination, 3 after a loss that is not finite.

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
            print(f"{opened.path} is finished already: test accuracy {opened.summary()['test_accuracy']:.1%}.")
            return 0
        session = _resume(opened, options) if opened else _start(options)
        try:
            return _train(session, started)
        finally:
            session.metrics.close()
            session.checkpoints.close()


def _open(options: TrainOptions) -> Run | None:
    if options.checkpoint_seconds < 0:
        raise UsageError(f"--checkpoint-seconds must be zero or more, got {options.checkpoint_seconds}.")
    if options.resume is None:
        return None
    if options.given() or options.config != "default":
        raise UsageError("--resume takes every setting from the run's config.json; leave the other settings out.")
    return Run.open(options.resume)


def _precision(dtype: str | None) -> contextlib.AbstractContextManager[Any]:
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _start(options: TrainOptions) -> Session:
    """Check the options, load the data, make the folder, then compile."""
    experiment = find_experiment(options.experiment)
    problem = build_problem(experiment, asked(experiment, options.config, options.given()), options.data_dir)
    settings = resolve(
        experiment, options.config, options.given(), len(problem.train[0]), problem.num_parameters, problem.noise
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
    return _session(run, problem, settings, options, None)


def _resume(run: Run, options: TrainOptions) -> Session:
    """Load what the run had, cut its metrics back to its checkpoint, and compile."""
    experiment, settings = find_experiment(run.config["experiment"]), Settings.from_dict(run.config)
    stored = run.config["data_dir"]
    problem = build_problem(experiment, settings, options.data_dir or (Path(stored) if stored else None))
    if problem.checksum != run.config["data_checksum"]:
        raise UsageError(
            f"The data set {experiment.data_set} is not the one that {run.path} was trained on (its checksum differs); "
            "give the old one with --data-dir, or start a new run."
        )
    checkpoints = Checkpoints(run.path / CHECKPOINTS)
    checkpoint = checkpoints.restore(jax.eval_shape(lambda: init_state(problem, settings)))
    checkpoints.close()
    step = int(checkpoint.state.step) if checkpoint else 0
    run.cut_metrics(step)
    print(f"Going on with {run.path} from step {step} of {settings.steps}.", flush=True)
    return _session(run, problem, settings, options, checkpoint)


def _session(
    run: Run, problem: Problem, settings: Settings, options: TrainOptions, checkpoint: Checkpoint | None
) -> Session:
    return Session(
        run=run,
        trainer=build_trainer(problem, settings, checkpoint.state if checkpoint else None),
        seconds=checkpoint.seconds if checkpoint else 0.0,
        checkpoints=Checkpoints(run.path / CHECKPOINTS),
        metrics=Metrics(run.path),
        checkpoint_seconds=options.checkpoint_seconds,
    )


def _train(session: Session, started: float) -> int:
    name, settings = session.run.config["experiment"], session.settings
    with Signals().watch() as signals:
        with make_reporter(name, settings.steps, session.trainer.step) as reporter:
            stopped_by = _run_blocks(session, reporter, signals)
        session.save()
        if stopped_by is not None:
            print(advice(session, stopped_by))
            return NOT_FINITE
        if session.trainer.step < settings.steps:
            print(
                f"Stopped at step {session.trainer.step} of {settings.steps}; go on with: "
                f"forwax train --resume {session.run.path}"
            )
            return INTERRUPTED if signals.received == signal.SIGINT else 143
        _finish(session, started)
    return 0


def _run_blocks(session: Session, reporter: Reporter, signals: Signals) -> float | None:
    """Run blocks until the last step, a signal, or a loss that is not finite, which is returned."""
    trainer, steps = session.trainer, session.settings.steps
    size, saved = 1, time.monotonic()
    while trainer.step < steps and signals.received is None:
        count = min(size, MAX_BLOCK, _next_evaluation(trainer.step, session.settings) - trainer.step)
        before, started = trainer.step, time.perf_counter()
        block = trainer.run(count)
        seconds = time.perf_counter() - started
        _record(session, block, before, seconds)
        if block.stopped_by is not None:
            return block.stopped_by
        pace = count / seconds
        reporter.update(trainer.step, float(block.losses.mean()), float(block.accuracies.mean()), pace)
        # a block grows at most fourfold, since the first ones measure the pace poorly
        size = max(1, min(int(BLOCK_SECONDS * pace), 4 * count if count == size else MAX_BLOCK))
        if time.monotonic() - saved >= session.checkpoint_seconds:
            session.save()
            saved = time.monotonic()
    return None


def _next_evaluation(step: int, settings: Settings) -> int:
    every = settings.eval_every or settings.steps
    return min((step // every + 1) * every, settings.steps)


def _record(session: Session, block: Block, before: int, seconds: float) -> None:
    """Append a line for each step of the block, and the evaluation where the block ends at one."""
    count, trainer = len(block.losses), session.trainer
    session.metrics.append(
        {
            "step": before + i + 1,
            "loss": float(block.losses[i]),
            "accuracy": float(block.accuracies[i]),
            "seconds": round(session.seconds + seconds * (i + 1) / count, 6),
        }
        for i in range(count)
    )
    session.seconds += seconds
    if block.stopped_by is None and trainer.step == _next_evaluation(before, session.settings):
        loss, accuracy = trainer.evaluate()
        row = {"step": trainer.step, "test_loss": loss, "test_accuracy": accuracy}
        row |= monitored(session.settings, trainer.state, trainer.problem.num_parameters)
        session.metrics.append([row | {"seconds": round(session.seconds, 6)}])


def advice(session: Session, loss: float) -> str:
    """Give one sentence on why the run stopped and what to try."""
    settings, n = session.settings, session.trainer.problem.num_parameters
    experiment = find_experiment(session.run.config["experiment"])
    rule = choices.build_rule(settings, jax.numpy.zeros(n))
    rate = settings.learning_rate or 0.0
    noise = session.trainer.problem.noise(rule)
    suggested = experiment.suggested_rate or (
        lambda settings: optimizers.suggest_rate(settings, rule, n, experiment.effective_dimension, noise)
    )
    smaller = min(suggested(settings), rate / 3)
    tries = [f"a smaller --learning-rate (say {smaller:.1g}; it was {rate:.2g})"]
    if settings.num_tangents is not None:
        tries.append(f"more --num-tangents (it was {settings.num_tangents})")
        guarded = "clip_slopes" in choices.RULES[settings.rule].takes
        tries += ["--clip-slopes 1"] if guarded and settings.clip_slopes != 1 else []
        tries += ["--skip-bad-slopes"] if guarded and math.isfinite(loss) and not settings.skip_bad_slopes else []
        tries += ["--combine projection"] if _takes_projection(settings) else []
    what = "gradient" if math.isfinite(loss) else "loss"
    return (
        f"Step {session.trainer.step + 1} was not made because its {what} is not finite (loss {loss:g}); the last "
        f"finite state is kept in {session.run.path}: try {' or '.join(tries)}."
    )


def _takes_projection(settings: Settings) -> bool:
    if "combine" not in choices.RULES[settings.rule].takes or settings.combine == "projection":
        return False
    try:
        choices.build_rule(dataclasses.replace(settings, combine="projection"))
    except UsageError:
        return False
    return True


def _finish(session: Session, started: float) -> None:
    """Draw the curves, write the summary (last, since it marks the run as finished), and tell the result."""
    # imported here: matplotlib takes a second that `forwax train --help` need not wait for
    from forwax.lab import style
    from forwax.lab.train import curves

    run, rows = session.run, session.run.metrics()
    summary = make_summary(session, rows)
    title = f"{run.config['experiment']}, rule {run.config['rule']}: {summary['test_accuracy']:.1%} on the test set"
    rule = "backprop" if session.settings.rule == "backprop" else "forward"
    curves.save_curves(rows, title, run.path / CURVES, style.PALETTE[rule])
    write_json(run.path / SUMMARY, summary)
    _print_end(run, summary, time.perf_counter() - started)


def make_summary(session: Session, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Gather what summary.json tells.

    Args:
        session: a session whose last step is made.
        rows: the lines of metrics.jsonl.
    """
    settings, trainer = session.settings, session.trainer
    tests = [row for row in rows if "test_accuracy" in row]
    losses = [row["loss"] for row in rows if "loss" in row][-100:]
    return {
        "experiment": session.run.config["experiment"],
        "config": session.run.config["config"],
        "rule": settings.rule,
        "reverse_mode": choices.RULES[settings.rule].reverse_mode,
        "test_accuracy": tests[-1]["test_accuracy"],
        "test_loss": tests[-1]["test_loss"],
        "train_loss": sum(losses) / len(losses),
        "steps": trainer.step,
        "seconds": session.seconds,
        "steps_per_second": trainer.step / session.seconds,
        "compile_seconds": trainer.compile_seconds,
        "compiled_temporary_bytes": trainer.temporary_bytes,
        "learning_rate": settings.learning_rate,
        "num_parameters": trainer.problem.num_parameters,
        "seed": settings.seed,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Give the versions of what a result depends on.

    >>> sorted(versions())
    ['equinox', 'forwax', 'jax', 'jaxlib', 'numpy', 'optax', 'python']
    """
    packages = ("forwax", "jax", "jaxlib", "numpy", "optax", "equinox")
    return {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}


def _print_start(run: Run, settings: Settings, problem: Problem) -> None:
    how = settings.rule
    if settings.num_tangents is not None:
        how += f", {settings.num_tangents} {settings.tangents} tangents a step"
        how += f", combined by {settings.combine}" if settings.combine else ""
    print(f"{run.config['experiment']}: {problem.num_parameters:,} parameters, {len(problem.train[0]):,} examples.")
    if settings.clip_slopes is not None:
        how += f", clipped at {settings.clip_slopes:g} running medians"
    if settings.skip_bad_slopes:
        how += ", skipped where they are not finite"
    print(f"Rule: {how}. Optimizer: {settings.optimizer}, learning rate {settings.learning_rate:.3g}.")
    print(f"Run: {run.path}", flush=True)


def _print_end(run: Run, summary: dict[str, Any], total: float) -> None:
    print(
        f"Test accuracy {summary['test_accuracy']:.1%} after {summary['steps']:,} steps: {summary['seconds']:.1f} s of "
        f"training at {summary['steps_per_second']:,.0f} steps/s, {total:.1f} s with loading, compiling and evaluating."
    )
    if choices.RULES[summary["rule"]].backward:
        print(choices.RULES[summary["rule"]].backward)
    print(f"Curves, metrics and summary: {run.path}")
