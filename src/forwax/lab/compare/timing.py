"""The time of one step under each rule, and of evaluating the loss once: warm, interleaved, medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forwax.lab.compare.training import Program
from forwax.lab.problem import Problem
from forwax.lab.train.loop import MAX_BLOCK, loops_well

LOSS = "loss"
"""The name under which the time of evaluating the loss once is given."""

ROUNDS, BLOCK_SECONDS, TOTAL_SECONDS = 15, 0.2, 60.0
"""Rounds over all rules; how long one measurement lasts; rounds stop after the total, but for the first three."""


def make_evaluations(problem: Problem, batch_size: int) -> Callable[..., jax.Array]:
    """Make the function that evaluates the mean loss of `count` batches, one after another, without a gradient.

    Args:
        problem: the experiment made ready.
        batch_size: the number of examples of a batch.
    """
    per_epoch = len(problem.train[0]) // batch_size

    def evaluations(
        params: Any,
        order: jax.Array,
        count: jax.Array,
        images: jax.Array,
        labels: jax.Array,
    ) -> jax.Array:
        def body(i: jax.Array, total: jax.Array) -> jax.Array:
            chosen = jax.lax.dynamic_slice_in_dim(order, i % per_epoch * batch_size, batch_size)
            losses, _ = jax.vmap(problem.loss, in_axes=(None, 0, 0))(
                params, images[chosen], labels[chosen]
            )
            return total + losses.mean()

        return jax.lax.fori_loop(0, count, body, jnp.float32(0))

    return evaluations


def measure(programs: dict[str, Program], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Measure the seconds of a step under each rule, and of evaluating the loss of a batch (`LOSS`).

    One round measures each in turn, so that a change of the machine's load meets all of them alike.
    A step is a whole training step: choosing the batch, the gradient and the update. Evaluating the
    loss includes choosing the batch.

    Args:
        programs: the compiled programs by rule.
        rounds: how many rounds.

    Returns:
        The seconds of each round, by rule.
    """
    runners = {LOSS: _loss_runner(next(iter(programs.values())))}
    runners |= {name: _step_runner(program) for name, program in programs.items()}
    counts = {name: _calibrate(run) for name, run in runners.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > TOTAL_SECONDS:
            break
        for name, run in runners.items():
            seconds[name].append(_time(run, counts[name]) / counts[name])
    return seconds


def _step_runner(program: Program) -> Callable[[int], None]:
    at = program.start(0)
    # at rate zero the parameters stay where they are, and the work is the same
    return lambda count: program.run(at, count, 0.0, 0) and None


def _loss_runner(program: Program) -> Callable[[int], None]:
    if not loops_well(program.problem):  # one call each, as the steps are made
        return _single_runner(program)
    evaluations = jax.jit(make_evaluations(program.problem, program.settings.batch_size))
    order = jnp.asarray(
        np.random.default_rng(0).permutation(len(program.problem.train[0])), jnp.int32
    )
    params = program.start(0).state.params
    return lambda count: (
        evaluations(params, order, np.int32(count), *program._data).block_until_ready() and None
    )


def _single_runner(program: Program) -> Callable[[int], None]:
    images, labels = (each[: program.settings.batch_size] for each in program._data)
    params, losses = (
        program.start(0).state.params,
        jax.vmap(program.problem.loss, in_axes=(None, 0, 0)),
    )
    mean_loss = jax.jit(lambda params, images, labels: losses(params, images, labels)[0].mean())

    def run(count: int) -> None:
        for _ in range(count):
            mean_loss(params, images, labels).block_until_ready()

    return run


def _calibrate(run: Callable[[int], None]) -> int:
    """Choose how many steps one measurement has; this warms up as well."""
    _time(run, 1)
    count = 1
    while (seconds := _time(run, count)) < BLOCK_SECONDS / 4 and count < MAX_BLOCK:
        count = min(4 * count, MAX_BLOCK)
    return int(np.clip(BLOCK_SECONDS * count / seconds, 1, MAX_BLOCK))


def _time(run: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return time.perf_counter() - started
