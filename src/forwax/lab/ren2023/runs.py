"""One method and seed of a column, trained in a folder that any interruption leaves resumable."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import UsageError
from forwax.lab.keeping.folder import CONFIG, SUMMARY, Run
from forwax.lab.keeping.seal import sealed
from forwax.lab.report import Json, write_json
from forwax.lab.training.folder import Files, opened
from forwax.lab.training.problem import Task
from forwax.lab.training.program import Block, scorer
from forwax.lab.training.session import Session, Signals, Sitting

KINDS: dict[str, Any] = {
    "finite": bool,
    "test_error": float | None,
    "train_error": float | None,
    "epochs": list,
    "test_errors": list,
    "losses": list,
}
"""What must stand in the summary of a finished run."""

Tell = Callable[[str], None]
"""Gets a line an epoch, and one about a loss that is not finite."""


def train(
    folder: Path,
    problem: Task,
    settings: Settings,
    tell: Tell = print,
    signals: Signals | None = None,
) -> Json:
    """Train from the start, or from the folder's last checkpoint; a finished run is only read.

    Args:
        folder: the run's own.
        problem: the experiment made ready.
        settings: the run's settings, with a learning rate.
        tell: gets what is told.
        signals: what stops the run between two blocks of steps.

    Returns:
        What summary.json holds: errors in percent, the curve, seconds.

    Raises:
        UsageError: when the folder holds a run with other settings or data.
        KeyboardInterrupt: after a signal and a checkpoint; the same call goes on from there.
    """
    run = _open(folder, problem, settings)
    if run.finished:
        summary = run.summary(KINDS)
        if not summary["finite"]:
            tell(
                f"not finite in an earlier sitting; to train it again, remove {folder}"
            )
        return summary
    per_epoch = max(1, problem.num_examples // settings.batch_size)
    with opened(run, problem, settings, whole_every=per_epoch) as files:
        session = _Epochs(files, problem, settings, per_epoch, tell)
        session.signals = signals or session.signals
        # while it compiles, Ctrl-C stops it at once
        with session.signals.watch():
            finite = session.run() is None
        if not finite:
            step = session.trainer.step + 1
            tell(f"the loss or its gradient is not finite at step {step}: given up")
        elif session.stopped_early:
            session.save()
            raise KeyboardInterrupt
        summary = _summary(run, session, finite)
        write_json(folder / SUMMARY, sealed(summary))
        files.checkpoints.remove()
    return summary


def _open(folder: Path, problem: Task, settings: Settings) -> Run:
    config = {**settings.as_dict(), "data_checksum": problem.checksum}
    if not os.path.lexists(folder / CONFIG):
        write_json(folder / CONFIG, sealed(config))
    run = Run.open(folder, Settings)
    # a setting that is newer than the run had its default value
    kept = Settings().as_dict() | run.config
    changed = [
        f"{name} is another ({kept.get(name)}, not {value})"
        for name, value in config.items()
        if kept.get(name) != value
    ]
    if changed:
        raise UsageError(
            f"{folder} holds a run whose {', '.join(changed)}; choose another --out, or "
            f"remove that folder."
        )
    return run


class _Epochs(Sitting):
    """An evaluation and a line for each epoch; `begun` is the one so far, step by step."""

    def __init__(
        self,
        files: Files,
        problem: Task,
        settings: Settings,
        per_epoch: int,
        tell: Tell,
    ):
        super().__init__(files, problem, settings, per_epoch)
        self.per_epoch = per_epoch
        self.tell = tell
        self.begun: dict[str, list[float]] = {"losses": [], "accuracies": []}
        for row in files.run.metrics()[-1:]:
            self.begun = row.get("begun", self.begun)

    def after_block(self, block: Block, seconds: float) -> None:
        self.begun["losses"] += block.losses.tolist()
        self.begun["accuracies"] += block.accuracies.tolist()

    def at_stop(self) -> None:
        loss, accuracy = (
            float(np.array(x, np.float32).mean()) for x in self.begun.values()
        )
        test_loss, test_accuracy = self.score(self.trainer.state.params)
        epoch = self.trainer.step / self.per_epoch
        test_error = 100 * (1 - test_accuracy)
        row = {
            "step": self.trainer.step,
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "test_loss": test_loss,
            "test_error": test_error,
            "seconds": round(self.seconds, 3),
        }
        self.metrics.append([row])
        self.begun = {"losses": [], "accuracies": []}
        errors = f"loss {loss:.4f}, test error {test_error:.2f} %"
        self.tell(f"epoch {epoch:g}: {errors}, {self.seconds:.0f} s")

    def save(self) -> None:
        """Write a checkpoint; inside an epoch its steps so far are a line too."""
        if self.begun["losses"]:
            self.metrics.append([{"step": self.trainer.step, "begun": self.begun}])
        super().save()


def _summary(run: Run, session: Session, finite: bool) -> Json:
    rows = [row for row in run.metrics() if "test_error" in row]
    train_error = None
    if finite:  # without noise or augmentation
        score = scorer(session.problem, session.problem.train)
        train_error = 100 * (1 - score(session.trainer.state.params)[1])
    return {
        "finite": finite,
        "test_error": rows[-1]["test_error"] if finite else None,
        "train_error": train_error,
        "epochs": [row["epoch"] for row in rows],
        "test_errors": [row["test_error"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "seconds_per_epoch": session.seconds / rows[-1]["epoch"] if rows else None,
        "num_devices": len(jax.local_devices())
        if session.settings.data_parallel
        else 1,
        **session.facts(),
    }
