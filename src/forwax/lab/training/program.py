"""Compiled training: a program that runs a block of steps and stops before a non-finite one.

The order of the data depends on (seed, epoch) and the tangents on (seed, step) alone, so that the
result does not depend on how the steps are cut into blocks. The learning rate and the seed are
inputs, so that one program serves every run of a rule.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from forwax.lab.catalogue.settings import Settings
from forwax.lab.training.problem import Examples, Problem
from forwax.lab.training.step import TrainState, init_state, make_step, placement, split_seed

MAX_BLOCK = 4096
"""The most steps of one block: the size of the buffers of losses and accuracies."""

EVALUATION_BATCH = 500


class Block(NamedTuple):
    """What a block of steps reports: a loss and an accuracy for each step that it made.

    `stopped_by` is the loss of the first step that was not made because it was not finite, or None.
    """

    losses: np.ndarray
    accuracies: np.ndarray
    stopped_by: float | None


class _Carry(NamedTuple):
    state: TrainState
    # the epoch and its permutation of the data pass from block to block
    epoch: jax.Array
    order: jax.Array
    done: jax.Array
    finite: jax.Array
    last_loss: jax.Array
    losses: jax.Array
    accuracies: jax.Array


def make_block(problem: Problem, settings: Settings) -> Any:
    """Make the function that runs `count` steps, or one at a time where `loops_well` says no."""
    step = make_step(problem, settings)
    data_key = split_seed(settings.seed).data
    spread = placement(settings)[1]
    batch = settings.batch_size
    num_examples = len(problem.train[0])
    looped = loops_well(problem)
    numbers = jnp.arange(num_examples, dtype=jnp.int32)

    def body(carry: _Carry, images: jax.Array, labels: jax.Array) -> _Carry:
        epoch, position = jnp.divmod(carry.state.step, num_examples // batch)
        order = jax.lax.cond(
            epoch == carry.epoch,
            lambda: carry.order,
            lambda: jax.random.permutation(jax.random.fold_in(data_key, epoch), numbers),
        )
        chosen = jax.lax.dynamic_slice_in_dim(order, position * batch, batch)
        state, loss, accuracy, finite = step(carry.state, *spread((images[chosen], labels[chosen])))
        loss = loss.astype(jnp.float32)
        return _Carry(
            state=state,
            epoch=epoch,
            order=order,
            done=carry.done + finite,
            finite=finite,
            last_loss=loss,
            losses=carry.losses.at[carry.done].set(loss),
            accuracies=carry.accuracies.at[carry.done].set(accuracy),
        )

    def block(state: TrainState, epoch: Any, order: Any, count: Any, *data: Any) -> _Carry:
        buffer = jnp.zeros(MAX_BLOCK, jnp.float32)
        none = jnp.int32(0), jnp.bool(True), jnp.float32(0)
        start = _Carry(state, epoch, order, *none, buffer, buffer)
        if not looped:  # one step, whatever the count
            return body(start, *data)
        goes_on = lambda carry: (carry.done < count) & carry.finite  # noqa: E731
        return jax.lax.while_loop(goes_on, lambda carry: body(carry, *data), start)

    return block


def loops_well(problem: Problem) -> bool:
    """Say whether steps may run in a compiled loop.

    XLA's CPU compiler runs the gradient of a convolution about twenty times slower inside a loop
    than outside.

    Args:
        problem: the experiment made ready.
    """
    image, label = (jax.ShapeDtypeStruct(each.shape[1:], each.dtype) for each in problem.train)
    params = jax.eval_shape(problem.init, jax.random.key(0))
    convolves = "conv_general_dilated" in str(jax.make_jaxpr(problem.loss)(params, image, label))
    return not (convolves and jax.default_backend() == "cpu")


class Scorer:
    """Gives the mean loss and the accuracy of parameters on one set, the same way for every rule.

    Example: `loss, accuracy = Scorer(problem, problem.test)(params)`
    """

    def __init__(self, problem: Problem, examples: Examples):
        self._count = len(examples[0])
        self._batches = jax.device_put(in_batches(*examples))

        def of_batch(params: Any, batch: Any) -> Any:
            images, labels, weights = batch
            losses, correct = jax.vmap(problem.loss, in_axes=(None, 0, 0))(params, images, labels)
            return jnp.sum(jnp.where(weights, losses, 0)), jnp.sum(correct & weights)

        def evaluate(params: Any, *batches: Any) -> Any:
            losses, correct = jax.lax.map(lambda batch: of_batch(params, batch), batches)
            return losses.sum(), correct.sum()

        self._evaluate = jax.jit(evaluate)

    def __call__(self, params: Any) -> tuple[float, float]:
        """Give the mean loss and the accuracy in [0, 1]."""
        losses, correct = self._evaluate(params, *self._batches)
        return float(losses) / self._count, float(correct) / self._count


def in_batches(images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Cut a set into equal batches; the padding of the last one has weight False."""
    size = min(EVALUATION_BATCH, len(images))
    pad = -len(images) % size
    weights = np.ones(len(images), bool)
    padded = (
        np.concatenate([x, np.zeros((pad, *x.shape[1:]), x.dtype)])
        for x in (images, labels, weights)
    )
    return [x.reshape(-1, size, *x.shape[1:]) for x in padded]


@dataclass(eq=False)
class Program:
    """The compiled block of steps of one problem and rule, for every learning rate and seed.

    Attributes:
        problem: the experiment made ready.
        settings: the rule's settings; their learning rate and seed stand for any other.
        data: the training set on the device.
        compile_seconds: how long tracing and compiling took.
        temporary_bytes: the temporary memory of the compiled block, as XLA reports it, or None
            where it does not.
    """

    problem: Problem
    settings: Settings
    data: Any
    compile_seconds: float
    temporary_bytes: int | None
    _block: Any
    _init: Any
    _where: Any

    def start(self, learning_rate: float, seed: int, state: TrainState | None = None) -> Trainer:
        """Give a run before its first step, or after the one that led to a state.

        The initial parameters of a seed are the same for every rule.

        Args:
            learning_rate: the rate at the start of the schedule.
            seed: the seed of everything.
            state: a state to go on from; its memory is given away.
        """
        state = self._init(np.uint32(seed)) if state is None else state
        order = jnp.zeros(len(self.problem.train[0]), jnp.int32)
        at: Any = state, jnp.int32(-1), order
        if self._where is not None:
            at = jax.device_put(at, self._where)
        return Trainer(self, learning_rate, seed, *at)


@dataclass(eq=False)
class Trainer:
    """A run of a program: its rate and seed, and where it is.

    Attributes:
        program: what makes its steps.
        learning_rate: the rate at the start of the schedule.
        seed: the seed of everything.
        state: the state after the last finite step.
    """

    program: Program
    learning_rate: float
    seed: int
    state: TrainState
    _epoch: Any
    _order: Any

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
        carry = self.program._block(
            self.state,
            self._epoch,
            self._order,
            np.int32(count),
            _rate(self.learning_rate),
            np.uint32(self.seed),
            *self.program.data,
        )
        self.state, self._epoch, self._order = carry.state, carry.epoch, carry.order
        done = int(carry.done)
        stopped_by = None if carry.finite else float(carry.last_loss)
        return Block(
            np.asarray(carry.losses)[:done], np.asarray(carry.accuracies)[:done], stopped_by
        )


def _rate(learning_rate: float) -> jax.Array:
    """The rate in the widest type of the day."""
    return jnp.asarray(learning_rate, float)


def build_program(problem: Problem, settings: Settings, data: Any = None) -> Program:
    """Compile the block of steps ahead of time.

    Args:
        problem: the experiment made ready.
        settings: settings with a learning rate, see `forwax.lab.catalogue.options.resolve`.
        data: the training set on the device, where several programs share it.

    >>> from forwax.lab.catalogue.experiments import EXPERIMENTS
    >>> from forwax.lab.training.problem import build_problem
    >>> settings = Settings(learning_rate=0.01)
    >>> program = build_program(build_problem(EXPERIMENTS["digits"], settings), settings)
    >>> trainer = program.start(0.01, seed=0)
    >>> trainer.run(3).losses.shape, trainer.step
    ((3,), 3)
    """
    where = placement(settings)[0]
    if data is None:
        data = jax.device_put(problem.train, where)

    def block(state: Any, epoch: Any, order: Any, count: Any, rate: Any, seed: Any, *data: Any):
        own = dataclasses.replace(settings, learning_rate=rate, seed=seed)
        return make_block(problem, own)(state, epoch, order, count, *data)

    def init(seed: Any) -> TrainState:
        return init_state(problem, dataclasses.replace(settings, seed=seed))

    shardings: dict[str, Any] = {"in_shardings": where, "out_shardings": where} if where else {}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    order = jax.ShapeDtypeStruct(problem.train[1].shape, jnp.int32)
    started = time.perf_counter()
    lowered = jax.jit(block, donate_argnums=(0, 1, 2), **shardings).lower(
        jax.eval_shape(init, np.uint32(0)),
        number,
        order,
        number,
        _rate(0),
        np.uint32(0),
        *data,
    )
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    temporary_bytes = None if memory is None else int(memory.temp_size_in_bytes)
    return Program(
        problem, settings, data, seconds, temporary_bytes, compiled, jax.jit(init), where
    )


def build_trainer(problem: Problem, settings: Settings, state: TrainState | None = None) -> Trainer:
    """Compile a program for one run, and go to its start.

    Args:
        problem: the experiment made ready.
        settings: as for `build_program`.
        state: a state to go on from; its memory is given away.
    """
    program = build_program(problem, settings)
    assert settings.learning_rate is not None
    return program.start(settings.learning_rate, settings.seed, state)
