"""One method and seed of a column, trained in a folder that any interruption leaves resumable."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax.lab.problem import Problem
from forwax.lab.settings import Settings, UsageError
from forwax.lab.train.checkpoints import Checkpoints
from forwax.lab.train.loop import (
    MAX_BLOCK,
    Trainer,
    build_trainer,
    in_batches,
    init_state,
    make_evaluator,
)
from forwax.lab.train.runs import CHECKPOINTS, CONFIG, SUMMARY, Metrics, Run, write_json
from forwax.lab.train.signals import Signals, block_size
from forwax.lab.train.sitting import versions

CHECKPOINT_SECONDS = 60.0
"""The least time between two checkpoints; one is written at a stop too."""


def train(
    folder: Path,
    problem: Problem,
    settings: Settings,
    tell: Callable[[str], None] = print,
    signals: Signals | None = None,
) -> dict[str, Any]:
    """Train from the start, or from the folder's last checkpoint; a finished run is only read.

    Args:
        folder: the run's own.
        problem: the experiment made ready.
        settings: the run's settings, with a learning rate.
        tell: gets a line an epoch, and one about a loss that is not finite.
        signals: what stops the run between two blocks of steps.

    Returns:
        What summary.json holds: errors in percent, the curve, seconds.

    Raises:
        UsageError: when the folder holds a run with other settings or data.
        KeyboardInterrupt: after a signal and a checkpoint; the same call goes on from there.
    """
    run = _open(folder, problem, settings)
    if run.finished:
        if not run.summary()["finite"]:
            tell(f"not finite in an earlier sitting; to train it again, remove {folder}")
        return run.summary()
    checkpoints, metrics = Checkpoints(folder / CHECKPOINTS), Metrics(folder)
    try:
        found = checkpoints.restore(jax.eval_shape(lambda: init_state(problem, settings)))
        trainer = build_trainer(problem, settings, found.state if found else None)
        run.cut_metrics(trainer.step)
        sitting = _Sitting(
            trainer,
            metrics,
            checkpoints,
            found.seconds if found else 0.0,
            _begun(run.metrics()),
        )
        finite = _epochs(sitting, tell, signals or Signals())
    finally:
        metrics.close()
        checkpoints.close()
    summary = _summary(run, trainer, sitting.seconds, finite)
    write_json(folder / SUMMARY, summary)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return summary


def _open(folder: Path, problem: Problem, settings: Settings) -> Run:
    config = {**settings.as_dict(), "data_checksum": problem.checksum}
    if not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
    run = Run.open(folder)
    kept = (
        Settings().as_dict() | run.config
    )  # a setting that is newer than the run had its default value
    changed = [name for name, value in config.items() if kept.get(name) != value]
    if changed:
        raise UsageError(
            f"{folder} holds a run whose {', '.join(changed)} is another; choose another --out, or "
            f"remove that folder."
        )
    return run


@dataclass(eq=False)
class _Sitting:
    """What training changes: the trainer, its files, the seconds of training, and the epoch so far, step by step."""

    trainer: Trainer
    metrics: Metrics
    checkpoints: Checkpoints
    seconds: float
    epoch: dict[str, list[float]]

    def run(self, count: int) -> tuple[float, bool]:
        """Run a block of steps; gives its seconds and whether all losses were finite."""
        started = time.perf_counter()
        block = self.trainer.run(count)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.epoch["losses"] += block.losses.tolist()
        self.epoch["accuracies"] += block.accuracies.tolist()
        return seconds, block.stopped_by is None

    def end_epoch(self, per_epoch: int) -> str:
        """Evaluate and write the epoch's line; gives one for people."""
        test_loss, test_accuracy = self.trainer.evaluate()
        means = {
            name: float(np.array(values, np.float32).mean()) for name, values in self.epoch.items()
        }
        row = {
            "step": self.trainer.step,
            "epoch": self.trainer.step / per_epoch,
            "loss": means["losses"],
            "accuracy": means["accuracies"],
            "test_loss": test_loss,
            "test_error": 100 * (1 - test_accuracy),
            "seconds": round(self.seconds, 3),
        }
        self.metrics.append([row])
        self.epoch = _begun([])
        errors = f"loss {row['loss']:.4f}, test error {row['test_error']:.2f} %"
        return f"epoch {row['epoch']:g}: {errors}, {self.seconds:.0f} s"

    def save(self) -> None:
        """Write a checkpoint, after the lines that it counts on; inside an epoch its steps so far are a line too."""
        if self.epoch["losses"]:
            self.metrics.append([{"step": self.trainer.step, "begun": self.epoch}])
        self.metrics.sync()
        self.checkpoints.save(self.trainer.state, self.seconds)


def _begun(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The epoch that the last line is inside of, as far as it went."""
    return rows[-1]["begun"] if rows and "begun" in rows[-1] else {"losses": [], "accuracies": []}


def _epochs(sitting: _Sitting, tell: Callable[[str], None], signals: Signals) -> bool:
    """Train to the end, block by block; gives whether all losses were finite."""
    trainer, settings = sitting.trainer, sitting.trainer.settings
    per_epoch = max(1, len(trainer.problem.train[0]) // settings.batch_size)
    size, saved = 1, time.monotonic()
    while trainer.step < settings.steps:
        if signals.received is not None:
            sitting.save()
            raise KeyboardInterrupt
        end = min((trainer.step // per_epoch + 1) * per_epoch, settings.steps)
        count = min(size, MAX_BLOCK, end - trainer.step)
        seconds, finite = sitting.run(count)
        if not finite:
            tell(f"the loss or its gradient is not finite at step {trainer.step + 1}: given up")
            return False
        size = block_size(count / seconds, size)
        if trainer.step == end:
            tell(sitting.end_epoch(per_epoch))
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            sitting.save()
            saved = time.monotonic()
    return True


def _summary(run: Run, trainer: Trainer, seconds: float, finite: bool) -> dict[str, Any]:
    rows = [row for row in run.metrics() if "test_error" in row]
    return {
        "finite": finite,
        "test_error": rows[-1]["test_error"] if finite else None,
        "train_error": training_error(trainer) if finite else None,
        "epochs": [row["epoch"] for row in rows],
        "test_errors": [row["test_error"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "seconds": seconds,
        "seconds_per_epoch": seconds / max(1e-9, rows[-1]["epoch"]) if rows else None,
        "compile_seconds": trainer.compile_seconds,
        "compiled_temporary_bytes": trainer.temporary_bytes,
        "num_parameters": trainer.problem.num_parameters,
        "device": jax.devices()[0].device_kind,
        "num_devices": len(jax.local_devices()) if trainer.settings.data_parallel else 1,
        "versions": versions(),
    }


def training_error(trainer: Trainer) -> float:
    """Give the error in percent on the training set, without noise or augmentation."""
    images, labels = trainer.problem.train
    evaluate, correct, size = jax.jit(make_evaluator(trainer.problem)), 0.0, 10_000
    for start in range(0, len(images), size):
        part = in_batches(images[start : start + size], labels[start : start + size])
        correct += float(evaluate(trainer.state.params, *part)[1])
    return 100 * (1 - correct / len(images))
