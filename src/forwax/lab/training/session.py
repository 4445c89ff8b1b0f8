"""A sitting of a run and the summary that it leaves."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax

from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.settings import Settings
from forwax.lab.training.checkpoints import Checkpoints
from forwax.lab.training.folder import Metrics, Run
from forwax.lab.training.program import Trainer


@dataclass(eq=False)
class Sitting:
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


def make_summary(sitting: Sitting, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Gather what summary.json tells.

    Args:
        sitting: a sitting whose last step is made.
        rows: the lines of metrics.jsonl.
    """
    settings, trainer = sitting.settings, sitting.trainer
    tests = [row for row in rows if "test_accuracy" in row]
    losses = [row["loss"] for row in rows if "loss" in row][-100:]
    return {
        "experiment": sitting.run.config["experiment"],
        "config": sitting.run.config["config"],
        "rule": settings.rule,
        "reverse_mode": choices.RULES[settings.rule].reverse_mode,
        "test_accuracy": tests[-1]["test_accuracy"],
        "test_loss": tests[-1]["test_loss"],
        "train_loss": sum(losses) / len(losses),
        "steps": trainer.step,
        "seconds": sitting.seconds,
        "steps_per_second": trainer.step / sitting.seconds,
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
    return {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version()
    }
