"""Makes the parts of a comparison: the timing, a candidate of the search, the run of one rule from one seed."""

from __future__ import annotations

import dataclasses
import math
import time
from datetime import timedelta
from typing import Any

import jax
import numpy as np

from forwax.lab.compare import timing
from forwax.lab.compare.setup import Comparison
from forwax.lab.compare.training import (
    Program,
    Scorer,
    build_program,
    evaluation_steps,
    train,
)

SECONDS_BETWEEN_LINES = 10.0


class Bench:
    """Makes the parts, and compiles no program before a part needs it.

    Attributes:
        comparison: the comparison made ready.
        seconds: the seconds of a step under each rule, once they are known.
    """

    def __init__(self, comparison: Comparison):
        self.comparison, self._programs = comparison, {}
        self._data = jax.device_put(comparison.problem.train)
        self._validation = Scorer(comparison.problem, comparison.validation)
        self._test = Scorer(comparison.problem, comparison.problem.test)
        self.seconds: dict[str, float] = {}

    def _program(self, name: str, steps: int) -> Program:
        if (name, steps) not in self._programs:
            settings = dataclasses.replace(self.comparison.settings[name], steps=steps)
            print(f"Compiling {name} for {steps:,} steps.", flush=True)
            self._programs[name, steps] = build_program(
                self.comparison.problem, settings, self._data
            )
        return self._programs[name, steps]

    def timing(self) -> dict[str, Any]:
        """Measure the time of a step under every rule, and gather the compiled memory."""
        steps = self.comparison.steps
        programs = {rule.name: self._program(rule.name, steps) for rule in self.comparison.rules}
        seconds = timing.measure(programs)
        for name, values in seconds.items():
            print(f"{name}: {1000 * np.median(values):.3g} ms", flush=True)
        return {
            "seconds": seconds,
            "temporary_bytes": {name: each.temporary_bytes for name, each in programs.items()},
        }

    def candidate(self, name: str, number: int, rate: float) -> dict[str, Any]:
        """Train with one learning rate of the search, on the first seed."""
        steps = self.comparison.search_steps
        program = self._program(name, steps)
        history, _ = train(program, rate, 0, self._validation, [steps], self.seconds[name])
        loss = history.validation_losses[-1] if history.finite else math.inf
        finite = math.isfinite(loss)
        count = self.comparison.options.search_rates
        what = f"validation loss {loss:.4g}" if finite else "not finite"
        print(f"{name}: rate {rate:.3g} ({number + 1} of {count}), {what}", flush=True)
        return {
            "learning_rate": rate,
            "steps": steps,
            "validation_loss": loss if finite else None,
        }

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Train under one rule from one seed, and test."""
        steps = self.comparison.steps
        at_steps = evaluation_steps(steps, self.comparison.options.evaluations)
        report = _Lines(f"{name}, seed {seed}", steps, self.seconds[name])
        started = time.perf_counter()
        history, params = train(
            self._program(name, steps),
            rate,
            seed,
            self._validation,
            at_steps,
            self.seconds[name],
            report,
        )
        wall = time.perf_counter() - started
        loss, accuracy = self._test(params)
        return {
            "rule": name,
            "seed": seed,
            "learning_rate": rate,
            "finite": history.finite,
            "steps_made": len(history.losses),
            "train_loss": history.train_loss if math.isfinite(history.train_loss) else None,
            "test_loss": loss if math.isfinite(loss) else None,
            "test_accuracy": accuracy,
            "wall_seconds": wall,
            "steps": history.steps,
            "validation_losses": [
                each if math.isfinite(each) else None for each in history.validation_losses
            ],
            "training_losses": history.binned(),
        }


class _Lines:
    """Prints how far a run is, every few seconds and at its end."""

    def __init__(self, name: str, steps: int, seconds_per_step: float):
        self._name, self._steps, self._pace = name, steps, seconds_per_step
        self._last = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        if step < self._steps and time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last, left = (
            time.monotonic(),
            timedelta(seconds=round((self._steps - step) * self._pace)),
        )
        print(
            f"{self._name}: step {step:,} of {self._steps:,}, training loss {loss:.4g}, {left} "
            f"left",
            flush=True,
        )
