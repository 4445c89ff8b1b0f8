"""Training runs of the feedback benchmark."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import forwax as fx
from feedback_rules import gradient, loss_of, start
from feedback_tasks import IN_AXES, Task

CHUNK = 25


class State(NamedTuple):
    """What a step changes."""

    rule: fx.Rule
    params: Any
    optimizer: Any


class Trainer:
    """Runs of one rule on one task; compiled once for all seeds and rates."""

    def __init__(self, task: Task, method: str):
        self.task, self.method = task, method
        estimate = gradient(loss_of(task, method))

        def step(
            state: State, rate: Array, steps: Array, seed: Array, number: Array
        ) -> tuple[State, Array]:
            stream = jax.random.fold_in(jax.random.key(7), seed)
            key, noise = jax.random.split(jax.random.fold_in(stream, number))
            value, grads, rule = estimate(
                state.rule, noise, state.params, *task.batch(key)
            )
            updates, optimizer = task.direction.update(grads, state.optimizer)
            now = rate * (1 + jnp.cos(jnp.pi * number / steps)) / 2
            params = jax.tree.map(lambda p, u: p - now * u, state.params, updates)
            is_left = number < steps  # the last chunk may be longer than what is left
            new = State(rule, params, optimizer)
            return jax.tree.map(
                lambda a, b: jnp.where(is_left, a, b), new, state
            ), value

        @jax.jit
        def chunk(
            state: State, rate: Array, steps: Array, seed: Array, first: Array
        ) -> tuple[State, Array]:
            numbers = first + jnp.arange(CHUNK)
            return lax.scan(lambda s, n: step(s, rate, steps, seed, n), state, numbers)

        self.chunk, self.score = chunk, jax.jit(task.score)

    def run(self, rate: float, steps: int, seed: int) -> dict[str, Any]:
        """The mean training loss of each chunk and the score; None where they are not finite."""
        begin = time.perf_counter()
        rule, params = start(self.task, self.method, seed)
        state = State(rule, params, self.task.direction.init(params))
        losses: list[float] = []
        arguments = (jnp.float32(rate), jnp.int32(steps), jnp.int32(seed))
        for first in range(0, steps, CHUNK):
            state, values = self.chunk(state, *arguments, jnp.int32(first))
            losses.append(float(jnp.mean(values[: steps - first])))
            if not math.isfinite(losses[-1]):
                break
        is_finite = math.isfinite(losses[-1])
        return {
            "losses": [round(x, 4) if math.isfinite(x) else None for x in losses],
            "last": float(np.mean(losses[-4:])) if is_finite else None,
            "score": float(self.score(state.params)) if is_finite else None,
            "seconds": round(time.perf_counter() - begin, 1),
        }


def arithmetic(task: Task, method: str) -> float:
    """Floating-point operations of a step's gradient, by the compiled program.

    Where maps learn in each n-th step only, the mean of that step and of n - 1 others.
    """
    loss = loss_of(task, method)
    rule, params = start(task, method, 0)
    args = (jax.random.key(0), params, *task.batch(jax.random.key(0)))

    def flops(function: Any, *args: Any) -> float:
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    every = getattr(rule, "every", 1)
    if every == 1:
        return flops(gradient(loss), rule, *args)
    learning = flops(gradient(loss), dataclasses.replace(rule, every=1), *args)
    resting = flops(
        lambda rule, *args: fx.value_and_grad(loss, rule, in_axes=IN_AXES)(*args),
        rule,
        *args,
    )
    return (learning + (every - 1) * resting) / every
