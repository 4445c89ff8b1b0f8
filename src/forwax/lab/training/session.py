"""One sitting of a training, block by block; commands differ in its parts.

A block ends at the next stop, where a subclass evaluates, or earlier: signals are answered between
two blocks.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Iterable

import numpy as np

from forwax.lab import report
from forwax.lab.catalogue.settings import Settings
from forwax.lab.distributed.signals import Signals
from forwax.lab.distributed.team import plan
from forwax.lab.report import Json
from forwax.lab.training.folder import Files
from forwax.lab.training.problem import Task
from forwax.lab.training.program import (
    MAX_BLOCK,
    Block,
    Score,
    Trainer,
    build_trainer,
    scorer,
)
from forwax.lab.training.progress import Report, compiling

BLOCK_SECONDS = 0.25
"""How long a block of steps should take, so that Ctrl-C is answered within half a second."""

NOT_FINITE = 3
"""The exit code of a run that a loss stopped which is not finite."""


def block_size(pace: float, last: int) -> int:
    """Give the steps of the next block.

    At most four times as many, since the first blocks measure the pace poorly.

    Args:
        pace: steps a second of the last block.
        last: the steps that the last block was meant to have.

    >>> block_size(1000.0, 16), block_size(1000.0, 200), block_size(0.1, 1)
    (64, 250, 1)
    """
    return max(1, min(int(BLOCK_SECONDS * pace), 4 * last))


class Session:
    """Trains from where a trainer is to its last step; the base of each command's own.

    Attributes:
        trainer: what makes the steps.
        stops: the steps at which a block must end, the last step among them.
        score: gives loss and accuracy of parameters at a stop.
        seconds: of training so far, those of earlier sittings included.
        signals: what stops it between two blocks.
        report: is told how far the run is.
    """

    checkpoint_seconds = 60.0
    """The least time between two checkpoints."""

    def __init__(self, trainer: Trainer, stops: Iterable[int], score: Score):
        self.trainer = trainer
        self.problem = trainer.program.problem
        self.settings = trainer.program.settings
        self.stops = sorted(stops)
        self.score = score
        self.seconds = 0.0
        self.signals = Signals()
        self.report: Report = lambda *told: None

    def after_block(self, block: Block, seconds: float) -> None:
        """Note what a block of steps gave, and how long it took; `seconds` counts it already."""

    def at_stop(self) -> None:
        """Do what is due at each of the stops."""

    @property
    def stopped_early(self) -> bool:
        """Whether a step is still to be made."""
        return self.trainer.step < self.stops[-1]

    def save(self) -> None:
        """Write a checkpoint, where the session has a folder."""

    def run(self) -> float | None:
        """Train until the last step, a signal, or a loss that is not finite, which is returned."""
        trainer = self.trainer
        size = 1
        saved = time.monotonic()
        is_due = False
        while self.stopped_early:
            size, is_due, is_stopped = plan(size, is_due, self.signals)
            if is_due:
                self.save()
                saved = time.monotonic()
            if is_stopped:
                break
            stop = self.stops[bisect(self.stops, trainer.step)]
            count = min(size, MAX_BLOCK, stop - trainer.step)
            started = time.perf_counter()
            block = trainer.run(count)
            seconds = time.perf_counter() - started
            self.seconds += seconds
            self.after_block(block, seconds)
            if block.stopped_by is not None:
                return block.stopped_by
            pace = count / seconds
            means = float(block.losses.mean()), float(block.accuracies.mean())
            self.report(trainer.step, *means, pace)
            if trainer.step == stop:
                self.at_stop()
            size = block_size(pace, size)
            is_due = time.monotonic() - saved >= self.checkpoint_seconds
        return None

    def facts(self) -> Json:
        """Give what every summary tells of the time, the memory and the machine."""
        program = self.trainer.program
        return {
            "seconds": self.seconds,
            "compile_seconds": program.compile_seconds,
            "compiled_temporary_bytes": program.temporary_bytes,
            "num_parameters": self.problem.num_parameters,
            **report.machine(),
        }


class Sitting(Session):
    """A session in a run's folder: from its last checkpoint on, with stops to score the test set.

    Args:
        files: the folder's.
        problem: the experiment made ready.
        settings: the run's settings, with a learning rate.
        every: how many steps lie between two stops.
        score: scores parameters at a stop, by default on the test set.
    """

    def __init__(
        self,
        files: Files,
        problem: Task,
        settings: Settings,
        every: int,
        score: Score | None = None,
    ):
        with compiling():
            trainer = build_trainer(problem, settings, files.state)
        super().__init__(
            trainer,
            {*range(0, settings.steps, every), settings.steps},
            score or scorer(problem, problem.test),
        )
        self.seconds = files.seconds
        self.run_config = files.run.config
        self.metrics = files.metrics
        self.checkpoints = files.checkpoints

    def save(self) -> None:
        """Write a checkpoint, after the metrics that it counts on."""
        self.metrics.sync()
        notes = {"config": self.run_config, "metrics": self.metrics.sums()}
        self.checkpoints.save(self.trainer.state, self.seconds, **notes)

    def after_block(self, block: Block, seconds: float) -> None:
        """Write a line for each step."""
        numbers = np.arange(1, len(block.losses) + 1)
        columns = {
            "step": self.trainer.step - len(numbers) + numbers,
            "loss": block.losses,
            "accuracy": block.accuracies,
            "seconds": (
                self.seconds - seconds + seconds * numbers / len(numbers)
            ).round(6),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        self.metrics.append(dict(zip(columns, row, strict=True)) for row in rows)
