"""A sitting's files: a run's folder, opened where its last checkpoint left it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import jax

from forwax.lab.catalogue.settings import Settings
from forwax.lab.distributed.keep import Opened, checkpoints_in, files_of_first
from forwax.lab.keeping.checkpoints import Checkpoint, Checkpoints
from forwax.lab.keeping.folder import CHECKPOINTS, CONFIG, CURVES, SUMMARY, Run
from forwax.lab.keeping.lock import writing
from forwax.lab.keeping.metrics import METRICS, Metrics, resumed
from forwax.lab.training.problem import Task
from forwax.lab.training.step import TrainState, init_state

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "CURVES",
    "METRICS",
    "SUMMARY",
    "Checkpoints",
    "Files",
    "Run",
    "opened",
]


@dataclass(eq=False)
class Files:
    """What a sitting writes to, and where the last one stopped: at a state, or None, at a step."""

    run: Run
    metrics: Metrics
    checkpoints: Checkpoints
    state: TrainState | None
    step: int
    seconds: float


@contextmanager
def opened(
    run: Run, problem: Task, settings: Settings, whole_every: int = 0
) -> Iterator[Files]:
    """Open a run's files, its metrics cut back to its last checkpoint, as their only writer.

    Args:
        run: the run.
        problem: the experiment made ready.
        settings: the run's settings.
        whole_every: see `forwax.lab.keeping.metrics.resumed`.

    Raises:
        UsageError: when another process writes to the folder, when config.json was changed, when a
            file is a link, or when there are checkpoints and none is sound.
    """
    like = jax.eval_shape(lambda: init_state(problem, settings))
    opening = _opened(run, like, whole_every)
    with files_of_first(opening, like) as (metrics, checkpoints, found):
        step = _step(found)
        yield Files(run, metrics, checkpoints, found.state, step, found.seconds)


@contextmanager
def _opened(run: Run, like: TrainState, whole_every: int) -> Iterator[Opened]:
    folder = run.path / CHECKPOINTS
    with writing(run.path), closing(checkpoints_in(folder)) as checkpoints:
        run.check_config(checkpoints.config)
        found = checkpoints.restore(like) or Checkpoint(None, 0.0, {})
        lines = found.notes.get("metrics")
        with closing(resumed(run.path, _step(found), lines, whole_every)) as metrics:
            yield metrics, checkpoints, found


def _step(found: Checkpoint) -> int:
    return int(found.state.step) if found.state else 0
