"""Compiled training: a program that runs a block of steps and stops before a non-finite one.

The order of the data depends on (seed, epoch) and the tangents on (seed, step) alone, so that the
result does not depend on how the steps are cut into blocks. The learning rate and the seed are
inputs, so that one program serves every run of a rule.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax.lab.catalogue.settings import Settings
from forwax.lab.distributed.placement import placement
from forwax.lab.training.problem import Examples, Task
from forwax.lab.training.step import (
    TrainState,
    init_state,
    make_step,
    split_seed,
)

MAX_BLOCK = 4096
"""The most steps of one block: the size of the buffers of losses and accuracies."""

EVALUATION_BATCH = 500

Score = Callable[[Any], tuple[float, float]]
"""From parameters to the mean loss and the accuracy in [0, 1]."""


class Block(NamedTuple):
    """What a block of steps reports: a loss and an accuracy for each step that it made.

    `stopped_by` is the loss of the first step that was not made because it was not finite, or None.
    """

    losses: np.ndarray
    accuracies: np.ndarray
    stopped_by: float | None


class _Carry(NamedTuple):
    """Where a run is, and what the last block gave.

    The epoch and its permutation of the data pass from block to block.
    """

    state: TrainState
    epoch: Array
    order: Array
    done: Array
    finite: Array
    losses: Array
    accuracies: Array


def make_block(problem: Task, settings: Settings) -> Callable[..., _Carry]:
    """Make the function that runs `count` steps, or one at a time where `loops_well` says no.

    It takes (carry, count, learning rate, seed, images, labels).
    """
    spread = placement(settings)[1]
    batch = settings.batch_size
    numbers = jnp.arange(problem.num_examples, dtype=jnp.int32)

    def block(carry: _Carry, count: Array, rate: Any, seed: Any, *data: Any) -> _Carry:
        step = make_step(
            problem, dataclasses.replace(settings, learning_rate=rate, seed=seed)
        )
        data_key = split_seed(seed).data

        def body(carry: _Carry) -> _Carry:
            epoch, position = jnp.divmod(carry.state.step, len(numbers) // batch)
            order = jax.lax.cond(
                epoch == carry.epoch,
                lambda: carry.order,
                lambda: jax.random.permutation(
                    jax.random.fold_in(data_key, epoch), numbers
                ),
            )
            chosen = jax.lax.dynamic_slice_in_dim(order, position * batch, batch)
            state, loss, accuracy, finite = step(
                carry.state, *spread([each[chosen] for each in data])
            )
            done = carry.done
            # where the step was not made, the next block writes over its loss
            return _Carry(
                state,
                epoch,
                order,
                done + finite.astype(done.dtype),
                finite,
                carry.losses.at[done].set(loss.astype(jnp.float32)),
                carry.accuracies.at[done].set(accuracy),
            )

        carry = carry._replace(done=jnp.int32(0), finite=jnp.bool(True))
        if not loops_well(problem):  # one step, whatever the count
            return body(carry)
        return jax.lax.while_loop(
            lambda carry: (carry.done < count) & carry.finite, body, carry
        )

    return block


def loops_well(problem: Task) -> bool:
    """Say whether steps may run in a compiled loop.

    XLA's CPU compiler runs the gradient of a convolution about twenty times slower inside a loop
    than outside.

    Args:
        problem: the experiment made ready.
    """
    image, label = (each[0] for each in problem.train)
    convolves = "conv_general_dilated" in str(
        jax.make_jaxpr(problem.loss)(
            jax.eval_shape(problem.init, jax.random.key(0)), image, label
        )
    )
    return not (convolves and jax.default_backend() == "cpu")


def scorer(problem: Task, examples: Examples) -> Score:
    """Make what scores parameters on one set, the same way for every rule.

    Example: `loss, accuracy = scorer(problem, problem.test)(params)`
    """
    on_device = jax.device_put(examples)

    @jax.jit
    def evaluate(params: Any, examples: Any) -> Any:
        return jax.lax.map(
            lambda each: problem.loss(params, *each),
            examples,
            batch_size=EVALUATION_BATCH,
        )

    def score(params: Any) -> tuple[float, float]:
        losses, correct = jax.device_get(evaluate(params, on_device))
        return float(np.mean(losses, dtype=float)), float(np.mean(correct))

    return score


class CompiledTraining:
    """The compiled block of steps of one problem and rule, for every learning rate and seed.

    Args:
        problem: the experiment made ready.
        settings: settings with a learning rate, see `forwax.lab.catalogue.options.resolve`; their
            learning rate and seed stand for any other.
        data: the training set on the device, where several programs share it.

    Attributes:
        compile_seconds: how long tracing and compiling took.
        temporary_bytes: the temporary memory of the compiled block, as XLA reports it, or None
            where it does not.

    >>> from forwax.lab.catalogue.experiments import EXPERIMENTS
    >>> from forwax.lab.training.problem import build_problem
    >>> settings = Settings(learning_rate=0.01)
    >>> program = CompiledTraining(build_problem(EXPERIMENTS["digits"], settings), settings)
    >>> trainer = program.start(0.01, seed=0)
    >>> trainer.run(3).losses.shape, trainer.step
    ((3,), 3)
    """

    def __init__(self, problem: Task, settings: Settings, data: Any = None):
        where = placement(settings)[0]

        def init(seed: Any) -> TrainState:
            return init_state(problem, dataclasses.replace(settings, seed=seed))

        self.problem = problem
        self.settings = settings
        self.data = jax.device_put(problem.train, where) if data is None else data
        self._init = jax.jit(init)
        self._where = where
        seed = np.uint32(0)
        spread: Any = {"in_shardings": where, "out_shardings": where} if where else {}
        started = time.perf_counter()
        block = jax.jit(make_block(problem, settings), donate_argnums=0, **spread)
        shapes = jax.eval_shape(lambda: _carry(self._init(seed), problem.num_examples))
        self.block = block.lower(
            shapes, np.int32(0), _rate(0), seed, *self.data
        ).compile()
        self.compile_seconds = time.perf_counter() - started
        memory = self.block.memory_analysis()
        self.temporary_bytes = memory and int(memory.temp_size_in_bytes)

    def start(
        self, learning_rate: float, seed: int, state: TrainState | None = None
    ) -> Trainer:
        """Give a run before its first step, or after the one that led to a state.

        The initial parameters of a seed are the same for every rule.

        Args:
            learning_rate: the rate at the start of the schedule.
            seed: the seed of everything.
            state: a state to go on from; its memory is given away.
        """
        begun = self._init(np.uint32(seed)) if state is None else state
        carry = _carry(begun, self.problem.num_examples)
        if self._where is not None:
            carry = jax.device_put(carry, self._where)
        return Trainer(self, learning_rate, seed, carry)


@dataclass(eq=False)
class Trainer:
    """A run of a program: its rate at the start of the schedule, its seed, and where it is."""

    program: CompiledTraining
    learning_rate: float
    seed: int
    _carry: _Carry

    @property
    def state(self) -> TrainState:
        """The state after the last finite step."""
        return self._carry.state

    @property
    def step(self) -> int:
        """The number of steps made."""
        return int(self.state.step)

    def run(self, count: int) -> Block:
        """Run `count` steps, fewer where one of them is not finite.

        Args:
            count: how many steps, from 1 to `MAX_BLOCK`.

        Returns:
            The losses and accuracies of the steps made.

        Raises:
            ValueError: when the count is out of range.
        """
        if not 1 <= count <= MAX_BLOCK:
            raise ValueError(f"a block has 1 to {MAX_BLOCK} steps, got {count}")
        blocks = []
        # a block makes one step, whatever the count, where the model does not loop well
        while count and (not blocks or blocks[-1].stopped_by is None):
            blocks.append(self._call(count))
            count -= len(blocks[-1].losses)
        losses, accuracies, stops = zip(*blocks, strict=True)
        return Block(np.concatenate(losses), np.concatenate(accuracies), stops[-1])

    def _call(self, count: int) -> Block:
        inputs = np.int32(count), _rate(self.learning_rate), np.uint32(self.seed)
        self._carry = carry = self.program.block(
            self._carry, *inputs, *self.program.data
        )
        done = int(carry.done)
        losses = np.asarray(carry.losses)
        stopped_by = None if carry.finite else float(losses[done])
        return Block(losses[:done], np.asarray(carry.accuracies)[:done], stopped_by)


def _carry(state: TrainState, num_examples: int) -> _Carry:
    """Where a run is when its sitting begins; no epoch is the current one yet."""
    buffer = jnp.zeros(MAX_BLOCK, jnp.float32)
    order = jnp.zeros(num_examples, jnp.int32)
    nothing = jnp.int32(0), jnp.bool(True), buffer, buffer.copy()
    return _Carry(state, jnp.int32(-1), order, *nothing)


def _rate(learning_rate: float) -> Array:
    """The rate in the widest type of the day."""
    return jnp.asarray(learning_rate, float)


def build_trainer(
    problem: Task, settings: Settings, state: TrainState | None = None
) -> Trainer:
    """Compile a program for one run, and go to its start.

    Args:
        problem: the experiment made ready.
        settings: the run's settings, with a learning rate.
        state: a state to go on from; its memory is given away.
    """
    program = CompiledTraining(problem, settings)
    assert settings.learning_rate is not None
    return program.start(settings.learning_rate, settings.seed, state)
