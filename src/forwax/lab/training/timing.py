"""The time of one step under each rule, and of evaluating the loss once: warm, in turns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax._reports.timing import interleaved, seconds_of
from forwax.lab.training.program import MAX_BLOCK, CompiledTraining, loops_well

LOSS = "loss"
"""The name under which the time of evaluating the loss once is given."""

ROUNDS = 15
BLOCK_SECONDS = 0.2
TOTAL_SECONDS = 60.0
"""How many rounds over all rules; how long one measurement, and all of them, should last."""

Run = Callable[[int], object]
"""Does so many steps."""


def measure(
    programs: dict[str, CompiledTraining], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Measure the seconds of a step under each rule, and of evaluating the loss of a batch.

    One round measures each in turn, so that a change of the machine's load meets all of them alike.
    A step is a whole training step: choosing the batch, the gradient and the update. Evaluating the
    loss (`LOSS`) includes choosing the batch.

    Args:
        programs: the compiled programs by rule.
        rounds: how many rounds.

    Returns:
        The seconds of each round, by rule.
    """
    runs = {LOSS: _evaluations(next(iter(programs.values())))}
    # at rate zero the parameters stay where they are, and the work is the same
    runs |= {name: program.start(0.0, seed=0).run for name, program in programs.items()}
    counts = {name: _calibrate(run) for name, run in runs.items()}
    calls = {name: partial(run, counts[name]) for name, run in runs.items()}
    return {
        name: (times / counts[name]).tolist()
        for name, times in interleaved(calls, rounds, max_seconds=TOTAL_SECONDS).items()
    }


def _evaluations(program: CompiledTraining) -> Run:
    """Evaluate the mean loss of batch after batch, in a compiled loop where the steps have one."""
    problem = program.problem
    size = program.settings.batch_size
    count = problem.num_examples
    order = jnp.asarray(np.random.default_rng(0).permutation(count), jnp.int32)
    losses = jax.vmap(problem.loss, in_axes=(None, 0, 0))
    inputs = program.start(0.0, seed=0).state.params, program.data

    def loss(number: Any, params: Any, data: Any) -> Array:
        first = number % (count // size) * size
        rows = jax.lax.dynamic_slice_in_dim(order, first, size)
        return losses(params, *(each[rows] for each in data))[0].mean()

    def total(count: int, *inputs: Any) -> Array:
        return jax.lax.fori_loop(
            0, count, lambda i, so_far: so_far + loss(i, *inputs), jnp.float32(0)
        )

    in_loop = loops_well(problem)
    evaluate = jax.jit(total if in_loop else loss)
    if in_loop:
        return lambda count: evaluate(count, *inputs)
    return lambda count: [
        evaluate(number, *inputs).block_until_ready() for number in range(count)
    ]


def _calibrate(run: Run) -> int:
    """Choose how many steps one measurement has; this warms up as well."""
    jax.block_until_ready(run(1))
    count = 1
    seconds = seconds_of(partial(run, 1))
    while seconds < BLOCK_SECONDS / 4 and count < MAX_BLOCK:
        count = min(4 * count, MAX_BLOCK)
        seconds = seconds_of(partial(run, count))
    return int(np.clip(BLOCK_SECONDS * count / seconds, 1, MAX_BLOCK))
