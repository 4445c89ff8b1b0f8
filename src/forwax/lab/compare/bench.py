"""Makes the parts of a comparison: the timing, a candidate of the search, the run of one rule."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import jax
import numpy as np

from forwax._reports.timing import medians
from forwax.lab.compare.setup import Comparison
from forwax.lab.report import Json, finite
from forwax.lab.training import timing
from forwax.lab.training.program import Block, CompiledTraining, Score, scorer
from forwax.lab.training.progress import reporting
from forwax.lab.training.session import Session

BINS = 200
"""How many means the training losses of a run are stored as."""


def evaluation_steps(steps: int, count: int) -> list[int]:
    """Choose when to take the validation loss: half evenly spaced, half in geometric progression.

    >>> evaluation_steps(100, 8)
    [0, 1, 5, 22, 25, 50, 75, 100]
    """
    even = np.linspace(0, steps, count // 2 + 1)
    geometric = np.geomspace(1, steps, max(count // 2, 2))
    return sorted({round(float(step)) for step in (*even, *geometric)})


class Trial(Session):
    """A run of one rule, and what it showed.

    Attributes:
        losses: the training loss of each step made.
        validated: the steps at which the validation loss was taken.
        validation_losses: the validation losses there.
        finite: whether every step was finite; if not, the run ended at the last finite one.
    """

    def __init__(
        self,
        program: CompiledTraining,
        rate: float,
        seed: int,
        score: Score,
        at_steps: Iterable[int],
    ):
        super().__init__(program.start(rate, seed), at_steps, score)
        self.losses: list[float] = []
        self.validated: list[int] = []
        self.validation_losses: list[float] = []
        self.finite = True

    def after_block(self, block: Block, seconds: float) -> None:
        """Keep the losses."""
        self.losses += block.losses.tolist()

    def at_stop(self) -> None:
        """Take the validation loss."""
        self.validated.append(len(self.losses))
        self.validation_losses.append(self.score(self.trainer.state.params)[0])

    def train(self) -> Trial:
        """Train from the first step to the last."""
        if self.stops[0] == 0:
            self.at_stop()
        self.finite = self.run() is None
        return self

    def binned(self) -> list[list[float]]:
        """Give at most `BINS` pairs (middle step, mean training loss)."""
        count = len(self.losses)
        points = np.column_stack([np.arange(1, count + 1), self.losses])
        return [
            part.mean(axis=0).tolist()
            for part in np.array_split(points, min(BINS, count) or 1)
            if len(part)
        ]


@dataclass(eq=False)
class Bench(Comparison):
    """A comparison that makes its parts; it compiles no program before a part needs it."""

    def __post_init__(self) -> None:
        self._program = cache(self._compiled)
        self._data = jax.device_put(self.problem.train)
        self._validation = scorer(self.problem, self.validation)
        self._test = scorer(self.problem, self.problem.test)

    def _compiled(self, name: str, steps: int) -> CompiledTraining:
        settings = replace(self.settings[name], steps=steps)
        print(f"Compiling {name} for {steps:,} steps.", flush=True)
        return CompiledTraining(self.problem, settings, self._data)

    def timing(self) -> Json:
        """Measure the time of a step under every rule, and gather the compiled memory."""
        programs = {name: self._program(name, self.steps) for name in self.settings}
        seconds = timing.measure(programs)
        for name, median in medians(seconds).items():
            print(f"{name}: {1000 * median:.3g} ms", flush=True)
        return {
            "seconds": seconds,
            "temporary_bytes": {
                name: each.temporary_bytes for name, each in programs.items()
            },
        }

    def candidate(self, name: str, number: int, rate: float) -> Json:
        """Train with one learning rate of the search, on the first seed."""
        steps = self.search_steps
        trial = Trial(self._program(name, steps), rate, 0, self._validation, [steps])
        trial.train()
        loss = finite(trial.validation_losses[-1]) if trial.finite else None
        count = self.options.search_rates
        what = "not finite" if loss is None else f"validation loss {loss:.4g}"
        print(f"{name}: rate {rate:.3g} ({number + 1} of {count}), {what}", flush=True)
        return {"learning_rate": rate, "steps": steps, "validation_loss": loss}

    def run(self, name: str, rate: float, seed: int) -> Json:
        """Train under one rule from one seed, and test."""
        steps = self.steps
        at_steps = evaluation_steps(steps, self.options.evaluations)
        program = self._program(name, steps)
        started = time.perf_counter()
        trial = Trial(program, rate, seed, self._validation, at_steps)
        with reporting(f"{name}, seed {seed}", steps, 0) as trial.report:
            trial.train()
        wall = time.perf_counter() - started
        loss, accuracy = self._test(trial.trainer.state.params)
        last = trial.losses[-100:]
        return {
            "rule": name,
            "seed": seed,
            "learning_rate": rate,
            "finite": trial.finite,
            "steps_made": len(trial.losses),
            "train_loss": finite(np.mean(last)) if last else None,
            "test_loss": finite(loss),
            "test_accuracy": accuracy,
            "wall_seconds": wall,
            "steps": trial.validated,
            "validation_losses": [finite(each) for each in trial.validation_losses],
            "training_losses": trial.binned(),
        }
