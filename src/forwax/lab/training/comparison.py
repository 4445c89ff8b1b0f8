"""One compiled program for each rule of a comparison, which serves every learning rate and every seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forwax.lab.catalogue.settings import Settings
from forwax.lab.training.problem import Problem
from forwax.lab.training.program import (
    MAX_BLOCK,
    TrainState,
    in_batches,
    init_state,
    make_block,
    make_evaluator,
)

BINS = 200
"""How many means the training losses of a run are stored as."""


@dataclass(eq=False)
class Position:
    """Where a run is: its state, and the epoch and data order that the block passes on."""

    state: TrainState
    epoch: Any
    order: Any


@dataclass(eq=False)
class Program:
    """The compiled training block of one rule.

    Attributes:
        problem: the experiment made ready.
        settings: the rule's settings; their learning rate and seed stand for any other.
        temporary_bytes: the temporary memory of the compiled block, as XLA reports it, or None
            where it does not.
    """

    problem: Problem
    settings: Settings
    temporary_bytes: int | None
    _init: Any
    _block: Any
    _data: Any

    def start(self, seed: int) -> Position:
        """Give the position before the first step: the same parameters for every rule."""
        return Position(
            self._init(np.int32(seed)),
            jnp.int32(-1),
            jnp.zeros(len(self.problem.train[0]), jnp.int32),
        )

    def run(
        self, at: Position, count: int, learning_rate: float, seed: int
    ) -> tuple[np.ndarray, bool]:
        """Run `count` steps, fewer where one is not finite, and move the position on.

        Args:
            at: the position; its arrays are given away and replaced.
            count: how many steps, at most `MAX_BLOCK`.
            learning_rate: the rate at the start of the schedule.
            seed: the seed of the data order and the tangents.

        Returns:
            The loss of each step made, and whether all were finite.
        """
        losses, finite = [], True
        # a block makes one step, whatever the count, where the model does not loop well
        while count and finite:
            carry = self._block(
                at.state,
                at.epoch,
                at.order,
                np.int32(count),
                np.float32(learning_rate),
                np.int32(seed),
                *self._data,
            )
            at.state, at.epoch, at.order = carry.state, carry.epoch, carry.order
            losses.append(np.asarray(carry.losses)[: int(carry.done)])
            count, finite = count - len(losses[-1]), bool(carry.finite)
        return np.concatenate(losses), finite


def build_program(problem: Problem, settings: Settings, data: Any) -> Program:
    """Compile the training block of one rule with the learning rate and the seed as inputs.

    Args:
        problem: the experiment made ready, its training set without the validation part.
        settings: the rule's settings, with any learning rate.
        data: the training set on the device, shared by all programs.
    """

    def block(
        state: Any, epoch: Any, order: Any, count: Any, rate: Any, seed: Any, *data: Any
    ) -> Any:
        run = make_block(problem, dataclasses.replace(settings, learning_rate=rate, seed=seed))
        return run(state, epoch, order, count, *data)

    init = jax.jit(lambda seed: init_state(problem, dataclasses.replace(settings, seed=seed)))
    program = Program(problem, settings, None, init, None, data)
    at = program.start(0)
    lowered = jax.jit(block, donate_argnums=(0, 1, 2)).lower(
        at.state, at.epoch, at.order, np.int32(1), np.float32(0), np.int32(0), *data
    )
    program._block = lowered.compile()
    memory = program._block.memory_analysis()
    program.temporary_bytes = None if memory is None else int(memory.temp_size_in_bytes)
    return program


class Scorer:
    """Gives the mean loss and the accuracy of parameters on one set, the same way for every rule.

    Example: `loss, accuracy = Scorer(problem, problem.test)(params)`
    """

    def __init__(self, problem: Problem, examples: tuple[np.ndarray, np.ndarray]):
        self._count = len(examples[0])
        self._batches = jax.device_put(in_batches(*examples))
        self._evaluate = jax.jit(make_evaluator(problem))

    def __call__(self, params: Any) -> tuple[float, float]:
        """Give the mean loss and the accuracy in [0, 1]."""
        losses, correct = self._evaluate(params, *self._batches)
        return float(losses) / self._count, float(correct) / self._count


@dataclass
class History:
    """What one run showed.

    Attributes:
        losses: the training loss of each step made.
        steps: the steps at which the validation loss was taken, from 0 on.
        validation_losses: the validation losses there.
        finite: whether every step was finite; if not, the run ended at the last finite one.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    finite: bool = True

    @property
    def train_loss(self) -> float:
        """The mean training loss of the last hundred steps."""
        return float(np.mean(self.losses[-100:])) if self.losses else float("nan")

    def binned(self) -> list[tuple[float, float]]:
        """Give at most `BINS` pairs (middle step, mean training loss)."""
        parts = np.array_split(np.arange(len(self.losses)), min(BINS, len(self.losses)))
        return [
            (float(part.mean() + 1), float(np.mean([self.losses[i] for i in part])))
            for part in parts
            if len(part)
        ]


def evaluation_steps(steps: int, count: int) -> list[int]:
    """Choose when to take the validation loss: half the points evenly spaced, half in geometric progression.

    >>> evaluation_steps(100, 8)
    [0, 1, 5, 22, 25, 50, 75, 100]
    """
    even = np.linspace(0, steps, count // 2 + 1)
    geometric = np.geomspace(1, steps, max(count // 2, 2))
    return sorted({round(float(step)) for step in (*even, *geometric)})


def train(
    program: Program,
    learning_rate: float,
    seed: int,
    score: Scorer,
    at_steps: list[int],
    seconds_per_step: float,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[History, Any]:
    """Train from the start to the last of the steps.

    Args:
        program: the rule's program.
        learning_rate: the rate at the start of the schedule.
        seed: the seed of everything.
        score: gives the validation loss.
        at_steps: the steps at which it is taken; the last one ends the run.
        seconds_per_step: about how long a step takes; a block takes about a second, so that Ctrl-C
            is answered.
        report: is told the step and the training loss after each block.

    Returns:
        The history and the parameters after the last finite step.
    """
    at, history = program.start(seed), History()
    size = int(np.clip(1 / max(seconds_per_step, 1e-9), 1, MAX_BLOCK))
    for target in at_steps:
        while history.finite and len(history.losses) < target:
            count = min(size, target - len(history.losses))
            losses, history.finite = program.run(at, count, learning_rate, seed)
            history.losses += losses.tolist()
            if len(losses):
                report(len(history.losses), float(losses.mean()))
        if not history.finite:
            break
        history.steps.append(target)
        history.validation_losses.append(score(at.state.params)[0])
    return history, at.state.params
