"""The training loop: a compiled program that runs a block of steps, however many, and stops before a non-finite one.

The order of the data depends on (seed, epoch) and the tangents on (seed, step) alone, so that the
result does not depend on how the steps are cut into blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import forwax as fx
from forwax.lab import choices
from forwax.lab.optimizers import build_optimizer
from forwax.lab.problem import Problem
from forwax.lab.settings import Settings, UsageError

MAX_BLOCK = 4096
"""The most steps of one block: the size of the buffers of losses and accuracies."""

EVALUATION_BATCH = 500


class TrainState(NamedTuple):
    """Everything that the next step depends on, besides the settings and the data."""

    params: Any
    opt_state: Any
    guess: Any
    step: jax.Array
    slopes: Any = None
    """What `forwax.Safe` remembers of them, or None."""


class Keys(NamedTuple):
    """The three independent keys of a run."""

    init: jax.Array
    data: jax.Array
    noise: jax.Array


class Block(NamedTuple):
    """What a block of steps reports: a loss and an accuracy for each step that it made, and whether it had to stop.

    `stopped_by` is the loss of the first step that was not made because it was not finite, or None.
    """

    losses: np.ndarray
    accuracies: np.ndarray
    stopped_by: float | None


class _Carry(NamedTuple):
    state: TrainState
    epoch: jax.Array
    order: jax.Array
    done: jax.Array
    finite: jax.Array
    last_loss: jax.Array
    losses: jax.Array
    accuracies: jax.Array


def split_seed(seed: int) -> Keys:
    """Give the keys of a seed.

    >>> split_seed(0).init.shape
    ()
    """
    return Keys(*jax.random.split(jax.random.key(seed), 3))


def init_state(problem: Problem, settings: Settings) -> TrainState:
    """Give the state before the first step.

    >>> from forwax.lab.experiments import EXPERIMENTS
    >>> from forwax.lab.problem import build_problem
    >>> settings = Settings(learning_rate=0.1)
    >>> int(init_state(build_problem(EXPERIMENTS["digits"], settings), settings).step)
    0
    """
    optimizer = _optimizer(settings)

    def init() -> TrainState:
        key = split_seed(settings.seed).init
        params = problem.init(key)
        guess = choices.initial_guess(settings, params, jax.random.fold_in(key, choices.FEEDBACK))
        rule = choices.guard_rule(settings, choices.build_rule(settings, guess))
        slopes = rule.init().history if isinstance(rule, fx.Safe) else None
        return TrainState(params, optimizer.init(params), guess, jnp.int32(0), slopes)

    # one program instead of one for each operation
    return jax.jit(init)()


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    if settings.learning_rate is None:
        raise ValueError(
            "expected settings with a learning rate, got None; use forwax.lab.options.resolve"
        )
    return build_optimizer(settings, settings.learning_rate)


def make_step(problem: Problem, settings: Settings) -> Any:
    """Make one training step as a pure function, not compiled.

    Args:
        problem: the experiment made ready.
        settings: the run's settings.

    Returns:
        A function from (state, images uint8 [batch, ...], labels [batch]) to (state, loss,
        accuracy, finite). Where the loss or the squared norm of the gradient is not finite, the
        state comes back unchanged.

    Example: `state, loss, accuracy, finite = make_step(problem, settings)(state, images, labels)`
    """
    optimizer, noise_key = _optimizer(settings), split_seed(settings.seed).noise

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> Any:
        key, slopes = jax.random.fold_in(noise_key, state.step), state.slopes
        rule = choices.guard_rule(settings, choices.build_rule(settings, state.guess), slopes)
        if isinstance(rule, fx.Safe) and problem.custom_gradient is None:
            gradient = rule.step(problem.loss, has_aux=True, in_axes=(None, 0, 0))
            (loss, correct), grads, rule = gradient(key, state.params, images, labels)
            slopes = rule.history
        else:
            (loss, correct), grads = problem.gradient(rule)(key, state.params, images, labels)
        finite = jnp.isfinite(loss) & jnp.isfinite(_squared_norm(grads))
        # a branch, not a select: a select would copy all parameters at every step
        advance = lambda s: _advance(s, grads, optimizer, settings)._replace(slopes=slopes)  # noqa: E731
        state = jax.lax.cond(finite, advance, lambda s: s, state)
        return state, loss, jnp.mean(correct, dtype=jnp.float32), finite

    return step


def _squared_norm(tree: Any) -> jax.Array:
    return sum((jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)), jnp.float32(0))


def _advance(
    state: TrainState,
    grads: Any,
    optimizer: optax.GradientTransformation,
    settings: Settings,
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    guess = state.guess
    if choices.needs_guess(settings):
        kept = settings.guess_decay or 0.0
        guess = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, guess, grads)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, guess, state.step + 1)


def make_block(problem: Problem, settings: Settings) -> Any:
    """Make the function that runs `count` steps, or one at a time where `loops_well` says no.

    `epoch` and `order` pass the epoch's permutation on from block to block. The learning rate and
    the seed of the settings may be traced values, so that one program serves many.
    """
    step, data_key = make_step(problem, settings), split_seed(settings.seed).data
    looped, num_examples, batch = (
        loops_well(problem),
        len(problem.train[0]),
        settings.batch_size,
    )
    spread = placement(settings)[1]
    per_epoch, numbers = (
        num_examples // batch,
        jnp.arange(num_examples, dtype=jnp.int32),
    )

    def body(carry: _Carry, images: jax.Array, labels: jax.Array) -> _Carry:
        epoch, position = jnp.divmod(carry.state.step, per_epoch)
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

    def block(
        state: TrainState, epoch: Any, order: Any, count: Any, images: Any, labels: Any
    ) -> _Carry:
        buffer = jnp.zeros(MAX_BLOCK, jnp.float32)
        start = _Carry(
            state,
            epoch,
            order,
            jnp.int32(0),
            jnp.bool(True),
            jnp.float32(0),
            buffer,
            buffer,
        )
        if not looped:  # one step, whatever the count
            return body(start, images, labels)
        return jax.lax.while_loop(
            lambda carry: (carry.done < count) & carry.finite,
            lambda carry: body(carry, images, labels),
            start,
        )

    return block


def placement(settings: Settings) -> tuple[NamedSharding | None, Callable[[Any], Any]]:
    """Say where a run's arrays lie, and spread a batch over the devices where the settings say so.

    Args:
        settings: the run's settings.

    Returns:
        A sharding that copies an array to every local device, or None for the one default device;
        and a function that spreads the leading axis of arrays inside a compiled program.

    Raises:
        UsageError: when a batch cannot be spread evenly.

    >>> placement(Settings())[0] is None
    True
    """
    devices = jax.local_devices()
    if not settings.data_parallel or len(devices) == 1:
        return None, lambda batch: batch
    if settings.batch_size % len(devices):
        raise UsageError(
            f"--batch-size must be a multiple of the {len(devices)} local devices that share it, "
            f"got "
            f"{settings.batch_size}."
        )
    mesh = jax.make_mesh((len(devices),), ("examples",), (AxisType.Auto,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("examples"))
    return NamedSharding(mesh, PartitionSpec()), lambda batch: jax.lax.with_sharding_constraint(
        batch, rows
    )


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


def make_evaluator(problem: Problem) -> Any:
    """Make the function from parameters and images in batches to the summed loss and the number of right answers."""

    def of_batch(
        params: Any, images: jax.Array, labels: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        losses, correct = jax.vmap(problem.loss, in_axes=(None, 0, 0))(params, images, labels)
        return jnp.sum(jnp.where(weight, losses, 0)), jnp.sum(correct & weight)

    def evaluate(
        params: Any, images: jax.Array, labels: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        losses, correct = jax.lax.map(
            lambda batch: of_batch(params, *batch), (images, labels, weights)
        )
        return losses.sum(), correct.sum()

    return evaluate


def in_batches(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the test set into equal batches; the padding of the last one has weight False."""
    size = min(EVALUATION_BATCH, len(images))
    count = -(-len(images) // size)
    pad = count * size - len(images)
    padded = np.concatenate([images, np.zeros((pad, *images.shape[1:]), images.dtype)])
    padded_labels = np.concatenate([labels, np.zeros(pad, labels.dtype)])
    weights = np.arange(count * size) < len(images)
    return (
        padded.reshape(count, size, *images.shape[1:]),
        padded_labels.reshape(count, size),
        weights.reshape(count, size),
    )


@dataclass(eq=False)
class Trainer:
    """The compiled programs of one run, and its state.

    Attributes:
        problem: the experiment made ready.
        settings: the run's settings, with every number filled in.
        state: the state after the last finite step.
        compile_seconds: how long tracing and compiling took.
        temporary_bytes: the temporary memory of the compiled block, as XLA reports it, or None
            where it does not.
    """

    problem: Problem
    settings: Settings
    state: TrainState
    compile_seconds: float
    temporary_bytes: int | None
    _block: Any
    _evaluate: Any
    _data: Any
    _test: Any
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
        blocks = [self._call(count)]
        while (done := sum(len(each.losses) for each in blocks)) < count and blocks[
            -1
        ].stopped_by is None:
            blocks.append(self._call(count - done))
        losses, accuracies, stops = zip(*blocks, strict=True)
        return Block(np.concatenate(losses), np.concatenate(accuracies), stops[-1])

    def _call(self, count: int) -> Block:
        carry = self._block(self.state, self._epoch, self._order, np.int32(count), *self._data)
        done, finite = int(carry.done), bool(carry.finite)
        self.state, self._epoch, self._order = carry.state, carry.epoch, carry.order
        stopped_by = None if finite else float(carry.last_loss)
        return Block(
            np.asarray(carry.losses)[:done],
            np.asarray(carry.accuracies)[:done],
            stopped_by,
        )

    def evaluate(self) -> tuple[float, float]:
        """Give the mean loss and the accuracy in [0, 1] on the test set."""
        losses, correct = self._evaluate(self.state.params, *self._test)
        count = len(self.problem.test[0])
        return float(losses) / count, float(correct) / count


def build_trainer(problem: Problem, settings: Settings, state: TrainState | None = None) -> Trainer:
    """Put the data on the device and compile the block of steps and the evaluation ahead of time.

    Args:
        problem: the experiment made ready.
        settings: settings with a learning rate, see `forwax.lab.options.resolve`.
        state: a state to go on from; the initial one by default. Its memory is given to the
            trainer.

    Returns:
        A trainer that has not made a step yet.

    >>> from forwax.lab.experiments import EXPERIMENTS
    >>> from forwax.lab.problem import build_problem
    >>> settings = Settings(learning_rate=0.01)
    >>> trainer = build_trainer(build_problem(EXPERIMENTS["digits"], settings), settings)
    >>> trainer.run(3).losses.shape, trainer.step
    ((3,), 3)
    """
    start: Any = init_state(problem, settings) if state is None else state
    everywhere = placement(settings)[0]
    epoch, order = jnp.int32(-1), jnp.zeros(len(problem.train[0]), jnp.int32)
    data, test = jax.device_put((problem.train, in_batches(*problem.test)), everywhere)
    if everywhere is not None:
        start = TrainState(*jax.device_put(tuple(start), everywhere))
        epoch, order = jax.device_put((epoch, order), everywhere)
    started = time.perf_counter()
    options: dict[str, Any] = {"out_shardings": everywhere} if everywhere else {}
    block = jax.jit(make_block(problem, settings), donate_argnums=(0, 1, 2), **options)
    compiled = block.lower(start, epoch, order, np.int32(1), *data).compile()
    evaluate = jax.jit(make_evaluator(problem)).lower(start.params, *test).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    return Trainer(
        problem=problem,
        settings=settings,
        state=start,
        compile_seconds=seconds,
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
        _block=compiled,
        _evaluate=evaluate,
        _data=data,
        _test=test,
        _epoch=epoch,
        _order=order,
    )
