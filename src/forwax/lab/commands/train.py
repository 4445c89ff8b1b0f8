"""`forwax train`: train an experiment's model, in a folder that resumes after any interruption."""

import contextlib
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from forwax.lab import report
from forwax.lab.catalogue.experiments import Experiment
from forwax.lab.catalogue.options import (
    asked,
    check_numbers,
    check_open_choices,
    find_experiment,
    resolve,
)
from forwax.lab.catalogue.rules import RULES
from forwax.lab.catalogue.settings import Settings
from forwax.lab.distributed import traffic
from forwax.lab.distributed.join import joined
from forwax.lab.distributed.keep import (
    check_data,
    checkpoints_in,
    command,
    run_of_first,
)
from forwax.lab.distributed.placement import placement
from forwax.lab.distributed.team import TEAM, from_first, in_turn
from forwax.lab.flags import Positive, UsageError, check_ranges
from forwax.lab.keeping.disk import going_on
from forwax.lab.keeping.folder import CHECKPOINTS, CURVES, SUMMARY, Run
from forwax.lab.keeping.metrics import SHARE, spans
from forwax.lab.keeping.seal import sealed
from forwax.lab.options.settings import SettingOptions
from forwax.lab.options.train import TrainOptions
from forwax.lab.report import Json, Rows
from forwax.lab.terminal import Shown, counted
from forwax.lab.training.advice import advice, monitored, smaller_rate
from forwax.lab.training.divergence import Divergence
from forwax.lab.training.folder import opened
from forwax.lab.training.problem import Task, build_problem
from forwax.lab.training.progress import reporting
from forwax.lab.training.session import NOT_FINITE, Sitting

KINDS: dict[str, Any] = {
    "experiment": str,
    "config": str,
    "learning_rate": Positive,
    "data_dir": str | None,
    "data_checksum": str,
}
"""What config.json holds beside the settings, and the setting that is never left open."""

TOLD = ("experiment", "config", "rule", "steps", "learning_rate", "seed")
"""What summary.json repeats of config.json."""


def run(options: TrainOptions) -> int:
    """Train, and tell how it went.

    Args:
        options: the command's options.

    Returns:
        The exit code: 0 when done, 130 after Ctrl-C, 143 after a termination, 3 after a loss that
        is not finite; with several processes also 4 and 5, see `forwax.lab.distributed`.

    Raises:
        UsageError: when the options do not go together.
        DataError: when the data cannot be loaded.

    Example:
        ```sh
        forwax train digits --steps 2000
        ```
    """
    started = time.perf_counter()
    check_ranges(options)
    if options.resume and (options.given() or options.config != "default"):
        raise UsageError(
            "--resume takes every setting from the run's config.json; leave the other settings out."
        )
    if options.print_config and options.distributed:
        raise UsageError("--print-config starts nothing: leave --distributed out.")
    with joined(options):
        return _run(options, started)


def _run(options: TrainOptions, started: float) -> int:
    run = None
    if options.resume is not None:
        run = run_of_first(
            partial(Run.open, options.resume, KINDS, Settings, SettingOptions)
        )
        if options.print_config:
            raise Shown(run.config)
    dtype = Settings.from_dict(run.config).dtype if run else options.dtype
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        if run is not None and from_first(partial(_is_finished, run)):
            return 0
        run, problem, settings = (
            in_turn(partial(_resume, run, options.data_dir)) if run else _start(options)
        )
        with (
            going_on(run.path, command(run.path)),
            opened(run, problem, settings) as files,
        ):
            if options.resume:
                whence = f"step {files.step} of {settings.steps}"
                print(f"Going on with {run.path} from {whence}.", flush=True)
            every = settings.eval_every or settings.steps
            session = _Training(files, problem, settings, every)
            session.checkpoint_seconds = options.checkpoint_seconds
            facts = traffic.tell(session.trainer.program, settings)
            with session.signals.watch():
                return _train(run, session, started, facts)


def _is_finished(run: Run) -> bool:
    """Tell the result of a run that has one."""
    if run.finished:
        run.check_config(checkpoints_in(run.path / CHECKPOINTS).config)
        accuracy = run.summary({"test_accuracy": SHARE})["test_accuracy"]
        print(f"{run.path} is finished already: test accuracy {accuracy:.1%}.")
    return run.finished


def _start(options: TrainOptions) -> tuple[Run, Task, Settings]:
    """Check the options, load the data, make the folder."""
    experiment = find_experiment(options.experiment)
    problem, settings = in_turn(lambda: _prepare(options, experiment))
    check_data(problem.checksum)
    kept = {
        "experiment": experiment.name,
        "config": options.config,
        **settings.as_dict(),
        "data_dir": str(options.data_dir.absolute()) if options.data_dir else None,
        "data_checksum": problem.checksum,
        "num_parameters": problem.num_parameters,
        "versions": report.versions(),
    }
    if options.print_config:
        raise Shown(kept)
    run = run_of_first(lambda: Run.create(options.runs, experiment.name, kept))
    print(
        f"{experiment.name}: {problem.num_parameters:,} parameters, "
        f"{problem.num_examples:,} examples.\n"
        f"Rule: {_told(settings)}. Optimizer: {settings.optimizer}, learning rate "
        f"{settings.learning_rate:.3g}.\nRun: {run.path}",
        flush=True,
    )
    # on another processor a rate may be another in its last bits
    return run, problem, Settings.from_dict(run.config)


def _prepare(options: TrainOptions, experiment: Experiment) -> tuple[Task, Settings]:
    given = options.given() | ({"data_parallel": True} if TEAM.count > 1 else {})
    choices = experiment, options.config, given
    problem = build_problem(experiment, asked(*choices), options.data_dir)
    settings = resolve(
        *choices, problem.num_examples, problem.num_parameters, problem.noise
    )
    placement(settings)
    return problem, settings


def _told(settings: Settings) -> str:
    """Tell the rule with what belongs to it."""
    words = [settings.rule]
    if settings.num_tangents is not None:
        kind = f"{settings.tangents} tangent" if settings.tangents else "noise"
        words.append(f"{counted(settings.num_tangents, kind)} a step")
        words += [f"combined by {settings.combine}"] if settings.combine else []
    if settings.clip_slopes is not None:
        words.append(f"clipped at {settings.clip_slopes:g} running medians")
    words += ["skipped where they are not finite"] if settings.skip_bad_slopes else []
    return ", ".join(words)


def _resume(run: Run, data_dir: Path | None) -> tuple[Run, Task, Settings]:
    """Load the settings and the data that the run had."""
    experiment = find_experiment(run.config["experiment"])
    settings = Settings.from_dict(run.config)
    check_open_choices(experiment, settings, {})
    stored = run.config["data_dir"]
    data_dir = data_dir or (stored and Path(stored))
    problem = build_problem(experiment, settings, data_dir)
    if problem.checksum != run.config["data_checksum"]:
        raise UsageError(
            f"The data set {experiment.data_set} is not the one that {run.path} was trained on "
            "(its checksum differs); give the old one with --data-dir, or start a new run."
        )
    check_numbers(settings, problem.num_examples)
    return run, problem, settings


class _Training(Sitting):
    """An evaluation on the test set every so often."""

    divergence: Divergence

    def at_stop(self) -> None:
        state = self.trainer.state
        loss, accuracy = self.score(state.params)
        self.divergence.see(self.trainer.step, loss)
        row = {"step": self.trainer.step, "test_loss": loss, "test_accuracy": accuracy}
        row |= monitored(self.settings, state, self.problem.num_parameters)
        self.metrics.append([row | {"seconds": round(self.seconds, 6)}])


def _train(run: Run, session: _Training, started: float, facts: Json) -> int:
    """Train until something stops it, and say what did."""
    name = run.config["experiment"]
    steps = session.settings.steps
    session.divergence = Divergence(
        run.path, partial(smaller_rate, name, session.trainer)
    )
    with reporting(name, steps, session.trainer.step) as session.report:
        stopped_by = session.run()
    session.save()
    if stopped_by is not None:
        print(advice(name, session.trainer, run.path, stopped_by))
        return NOT_FINITE
    if session.stopped_early:
        print(
            f"Stopped at step {session.trainer.step} of {steps}; go on with: {command(run.path)}"
        )
        return session.signals.code
    _finish(run, session, started, facts)
    return 0


def _finish(run: Run, session: _Training, started: float, facts: Json) -> None:
    """Draw the curves, write the summary, tell the result.

    The summary comes last, since it marks the run as finished.
    """
    # imported here: matplotlib takes a second that `forwax train --help` need not wait for
    from forwax.lab import style
    from forwax.lab.pictures import curves

    settings = session.settings
    rule = RULES[settings.rule]
    tests = [row for row in run.metrics() if "test_accuracy" in row]
    # where damage took or may have changed what counts most, it is found again
    steps = [row["step"] for row in tests]
    if from_first(lambda: session.metrics.doubtful or settings.steps not in steps):
        session.at_stop()
    if TEAM.index:
        return
    rows = run.metrics()
    last = [row for row in rows if "test_accuracy" in row][-1]
    damage = _damage(rows, session)
    losses = [row["loss"] for row in rows if "loss" in row][-100:]
    accuracy = f"{last['test_accuracy']:.1%}"
    pace = settings.steps / session.seconds
    summary = {
        **{name: run.config[name] for name in TOLD},
        "reverse_mode": not rule.backward,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_loss": sum(losses) / len(losses) if losses else None,
        "steps_per_second": pace,
        **damage,
        **session.facts(),
        **facts,
    }
    name = run.config["experiment"]
    title = f"{name}, rule {settings.rule}: {accuracy} on the test set"
    for what, steps in damage.items():
        told = textwrap.shorten(steps, 60, placeholder=" ...")
        title += f"\n{what.replace('_', ' ')}: {told}"
    colour = style.PALETTE["backprop" if settings.rule == "backprop" else "forward"]
    style.save(curves.draw_curves(rows, title, colour), run.path / CURVES)
    report.write_json(run.path / SUMMARY, sealed(summary))
    total = time.perf_counter() - started
    print(
        f"Test accuracy {accuracy} after {settings.steps:,} steps: {session.seconds:.1f} s of "
        f"training at {pace:,.0f} steps/s, {total:.1f} s with loading, compiling and evaluating."
    )
    if rule.backward:
        print(rule.backward)
    print(session.divergence.end(last["test_loss"]), end="")
    print(f"Curves, metrics and summary: {run.path}")


def _damage(rows: Rows, session: _Training) -> Json:
    """Say which steps have lost their lines, and which lines may not be what was written."""
    steps = {row["step"] for row in rows if "loss" in row}
    tests = {row["step"] for row in rows if "test_accuracy" in row}
    missing = {*range(1, session.settings.steps + 1)} - steps
    missing |= {*session.stops} - {0, *tests}
    found = {
        "missing_steps": spans(missing),
        "doubtful_steps": session.metrics.doubtful,
    }
    return {name: told for name, told in found.items() if told}
