"""One run of `forwax finetune`: made ready, trained in a folder that resumes, told."""

import importlib.util
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

import forwax as fx
from forwax.lab import report
from forwax.lab.catalogue.rules import RULES as CHOICES
from forwax.lab.catalogue.rules import guarded_rule
from forwax.lab.catalogue.settings import Settings
from forwax.lab.compare.setup import part
from forwax.lab.finetune import models, options, problem, results
from forwax.lab.finetune.models import Model
from forwax.lab.finetune.problem import AXES, Tuning
from forwax.lab.flags import UsageError
from forwax.lab.options.finetune import FinetuneOptions
from forwax.lab.report import Json
from forwax.lab.terminal import Shown
from forwax.lab.texts import sets as texts
from forwax.lab.training.folder import CURVES, SUMMARY, Run, opened
from forwax.lab.training.program import Score
from forwax.lab.training.progress import reporting
from forwax.lab.training.session import NOT_FINITE, Sitting
from forwax.lab.training.step import split_seed

ADAPTER = "adapter.safetensors"
CURVATURE = 0xC0
"""Folded into a seed's key for measuring a rate: the small numbers give the steps' keys."""

DRAWS = 32


@dataclass(frozen=True, eq=False)
class Ready:
    """All that a run needs: its options, the model, the task."""

    options: FinetuneOptions
    model: Model
    task: Tuning

    def score(self) -> Score:
        """Loss and accuracy on held-out texts."""
        of_validation = self.task.scores(self.task.validation)

        def score(params: Any) -> tuple[float, float]:
            losses, correct, _ = of_validation(params)
            return results.mean(losses), results.mean(correct)

        return score

    def with_prefixes(self) -> "Ready":
        """The same with what is frozen computed once, see `problem.with_prefixes`."""
        return replace(self, task=problem.with_prefixes(self.task, self.model))

    def rate(self, run: Run, rule: str) -> float:
        """The rate that the user gave, or the measured one, which the run's folder keeps.

        Raises:
            UsageError: where there is none, or the folder's is not what was kept.
        """
        given = self.options.learning_rate
        return (
            given
            or part(run.path, f"rate-{rule}", self.measured, rule)["learning_rate"]
        )

    def measured(self, rule: str) -> Json:
        """The rate that the loss's curvature suggests on a batch, see `measure_curvature`.

        Raises:
            UsageError: where there is none.
        """
        settings = self.options.settings(rule, 1.0)
        task = self.task
        built = task.credited(task.ready(guarded_rule(settings), task.start))
        rows, labels = jax.device_put(task.batch(task.train, 0))  # type: ignore[arg-type]

        print(f"{rule}: compiling, to measure a rate.", flush=True)
        key = jax.random.fold_in(split_seed(settings.seed).noise, CURVATURE)
        measure = fx.measure_curvature(
            task.loss_beside, built, has_aux=True, in_axes=AXES, draws=DRAWS
        )
        found = measure(key, task.start, rows.frozen, rows.own, labels)
        if found.learning_rate is None:
            raise UsageError(
                f"No learning rate could be measured for {rule}: {found.reason}; give "
                "--learning-rate."
            )
        return {"learning_rate": found.learning_rate}


def make_ready(asked: FinetuneOptions) -> Ready:
    """Load the model and the texts, and make the task.

    Raises:
        UsageError: when the options do not go together, or the extra `lm` is missing.
        DataError: when model or texts cannot be loaded.
    """
    options.check(asked)
    for package in ("gguf", "safetensors", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed; forwax finetune needs: pip install 'forwax[lm]'."
            )
    found = texts.load(asked.data, asked.data_dir)
    model = models.load(asked.model, asked.packed, asked.data_dir)
    return Ready(asked, model, problem.build(model, found, asked))


def create(ready: Ready) -> Run:
    """Make the run's folder, and say what will be trained on what.

    A run that is killed from here on goes on with --resume.

    Raises:
        Shown: with --print-config, what config.json would hold.
    """
    asked = ready.options
    task = ready.task
    own = asked.settings(asked.rule, asked.learning_rate).as_dict()
    config = {
        **({} if asked.compare else own),
        "options": options.as_json(asked),
        "data_checksum": task.checksum,
        "num_parameters": task.num_parameters,
        "versions": report.versions(),
    }
    if asked.print_config:
        raise Shown(config)
    name = f"finetune-{Path(asked.model).stem}"
    run = Run.create(asked.runs, name, config)
    for name in (asked.data, asked.model):
        if name in texts.SOURCES:
            print(f"{name}: {texts.SOURCES[name].terms}")
    print(
        f"{ready.model.config.name}, {asked.adapter}: {task.num_parameters:,} trained numbers. "
        f"{asked.data}: {task.num_examples:,} texts to train on, {len(task.validation[1])} to "
        f"choose by, {len(task.test[1]):,} to test.\n"
        f"Rule: {', '.join(asked.rules)}.\nRun: {run.path}",
        flush=True,
    )
    return run


def check_data(run: Run, ready: Ready) -> None:
    """Refuse to go on with other data.

    Raises:
        UsageError: where the checksum differs.
    """
    if run.config["data_checksum"] != ready.task.checksum:
        raise UsageError(
            f"The texts or the model are not those that {run.path} was trained with (their "
            "checksum differs); give the old ones with --data-dir, or start a new run."
        )


class Finetuning(Sitting):
    """A sitting with an evaluation on the held-out texts every so often."""

    def at_stop(self) -> None:
        """Write loss and accuracy on the held-out texts."""
        loss, accuracy = map(report.finite, self.score(self.trainer.state.params))
        row = {"step": self.trainer.step, "validation_loss": loss}
        row |= {"validation_accuracy": accuracy, "seconds": round(self.seconds, 6)}
        self.metrics.append([row])


def train(ready: Ready, run: Run) -> int:
    """Train until something stops it, and say what did.

    Args:
        ready: the task, see `make_ready`.
        run: the run's folder.

    Returns:
        The exit code.
    """
    started = time.perf_counter()
    asked = ready.options
    settings = Settings.from_dict(run.config)
    settings = replace(settings, learning_rate=ready.rate(run, asked.rule))
    with opened(run, ready.task, settings) as files:
        print(
            f"From step {files.step} of {settings.steps}, learning rate "
            f"{settings.learning_rate:.3g}: compiling.",
            flush=True,
        )
        assert settings.eval_every is not None
        session = Finetuning(
            files, ready.task, settings, settings.eval_every, ready.score()
        )
        session.checkpoint_seconds = asked.checkpoint_seconds
        with session.signals.watch():
            return _train(ready, run, session, started)


def _train(ready: Ready, run: Run, session: Finetuning, started: float) -> int:
    steps = session.settings.steps
    with reporting(run.path.name, steps, session.trainer.step) as session.report:
        stopped_by = session.run()
    session.save()
    step = session.trainer.step
    if stopped_by is not None:
        rate = session.settings.learning_rate or 0.0
        print(
            f"Step {step + 1} was not made because its loss or gradient is not finite (loss "
            f"{stopped_by:g}); the last finite state is kept in {run.path}: try a smaller "
            f"--learning-rate, say {rate / 3:.1g}; it was {rate:.2g}."
        )
        return NOT_FINITE
    if session.stopped_early:
        print(
            f"Stopped at step {step} of {steps}; go on with: forwax finetune --resume {run.path}"
        )
        return session.signals.code
    _finish(ready, run, session, started)
    return 0


def _finish(ready: Ready, run: Run, session: Finetuning, started: float) -> None:
    """Write the adapter, the curves and the summary, which marks the run as finished."""
    # imported here: matplotlib takes a second that `forwax finetune --help` need not wait for
    from forwax.lab import style
    from forwax.lab.pictures import curves

    asked = ready.options
    trained = session.trainer.state.params
    found = results.outcome(ready.task, trained)
    held = results.memory(ready.task, session.trainer.program.block)
    results.save(run.path / ADAPTER, trained, ready.model)
    title = f"{ready.model.config.name}, {asked.adapter}, rule {asked.rule}"
    colour = style.PALETTE["backprop" if asked.rule == "backprop" else "forward"]
    figure = curves.draw_curves(run.metrics(), title, colour, "validation")
    style.save(figure, run.path / CURVES)
    summary = {
        "rule": asked.rule,
        "steps": asked.steps,
        "learning_rate": session.settings.learning_rate,
        **found,
        **held,
        **session.facts(),
    }
    report.write_json(run.path / SUMMARY, summary)
    seconds = time.perf_counter() - started
    print(
        f"{results.told(found)}\n{results.memory_told(held)}\n{asked.steps:,} steps in "
        f"{session.seconds:.1f} s of training, {seconds:.1f} s with loading, compiling and "
        "evaluating."
    )
    backward = CHOICES[session.settings.rule].backward
    if backward:
        print(backward)
    print(f"Adapter, curves, metrics and summary: {run.path}")
