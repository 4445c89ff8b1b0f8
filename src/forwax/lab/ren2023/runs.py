"""One method and seed of a column, trained in a folder that any interruption leaves resumable."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax.lab.problem import Problem
from forwax.lab.settings import Settings, UsageError
from forwax.lab.train.checkpoints import Checkpoints
from forwax.lab.train.command import versions
from forwax.lab.train.loop import MAX_BLOCK, Trainer, build_trainer, in_batches, init_state, make_evaluator
from forwax.lab.train.runs import CHECKPOINTS, CONFIG, SUMMARY, Metrics, Run, write_json

CHECKPOINT_SECONDS = 60.0
"""The least time between two checkpoints, which are written at ends of epochs."""


def train(folder: Path, problem: Problem, settings: Settings, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Train from the start, or from the folder's last checkpoint; a finished run is only read.

    Args:
        folder: the run's own.
        problem: the experiment made ready.
        settings: the run's settings, with a learning rate.
        tell: gets a line an epoch.

    Returns:
        What summary.json holds: errors in percent, the curve, seconds.

    Raises:
        UsageError: when the folder holds a run with other settings or data.
    """
    run = _open(folder, problem, settings)
    if run.finished:
        return run.summary()
    checkpoints, metrics = Checkpoints(folder / CHECKPOINTS), Metrics(folder)
    try:
        found = checkpoints.restore(jax.eval_shape(lambda: init_state(problem, settings)))
        trainer = build_trainer(problem, settings, found.state if found else None)
        run.cut_metrics(trainer.step)
        seconds, finite = _epochs(trainer, found.seconds if found else 0.0, metrics, checkpoints, tell)
    finally:
        metrics.close()
        checkpoints.close()
    summary = _summary(run, trainer, seconds, finite)
    write_json(folder / SUMMARY, summary)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return summary


def _open(folder: Path, problem: Problem, settings: Settings) -> Run:
    config = {**settings.as_dict(), "data_checksum": problem.checksum}
    if not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)
    run = Run.open(folder)
    kept = Settings().as_dict() | run.config  # a setting that is newer than the run had its default value
    changed = [name for name, value in config.items() if kept.get(name) != value]
    if changed:
        raise UsageError(
            f"{folder} holds a run whose {', '.join(changed)} is another; choose another --out, or remove that folder."
        )
    return run


def _epochs(
    trainer: Trainer, seconds: float, metrics: Metrics, checkpoints: Checkpoints, tell: Callable[[str], None]
) -> tuple[float, bool]:
    """Train to the end, epoch by epoch; gives the seconds of training and whether all losses were finite."""
    settings = trainer.settings
    per_epoch = max(1, len(trainer.problem.train[0]) // settings.batch_size)
    saved = time.monotonic()
    while trainer.step < settings.steps:
        end = min((trainer.step // per_epoch + 1) * per_epoch, settings.steps)
        losses, accuracies, started = [], [], time.perf_counter()
        while trainer.step < end:
            block = trainer.run(min(MAX_BLOCK, end - trainer.step))
            losses.append(block.losses)
            accuracies.append(block.accuracies)
            if block.stopped_by is not None:
                return seconds, False
        seconds += time.perf_counter() - started
        test_loss, test_accuracy = trainer.evaluate()
        row = {
            "step": trainer.step,
            "epoch": trainer.step / per_epoch,
            "loss": float(np.concatenate(losses).mean()),
            "accuracy": float(np.concatenate(accuracies).mean()),
            "test_loss": test_loss,
            "test_error": 100 * (1 - test_accuracy),
            "seconds": round(seconds, 3),
        }
        metrics.append([row])
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            metrics.sync()
            checkpoints.save(trainer.state, seconds)
            saved = time.monotonic()
        tell(f"epoch {row['epoch']:g}: loss {row['loss']:.4f}, test error {row['test_error']:.2f} %, {seconds:.0f} s")
    return seconds, True


def _summary(run: Run, trainer: Trainer, seconds: float, finite: bool) -> dict[str, Any]:
    rows = run.metrics()
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
