"""Gradient descent on a test function under one rule: every run's values, and the seconds that one run takes.

All iterations are one compiled `lax.scan`. The runs are computed together under `vmap`; the seconds
are those of single runs, compiled and warm, so that loss against seconds compares what a user of
one run would wait.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx

__all__ = ["Descent", "Plan", "Timing", "descend", "measure", "seconds_of"]

REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all runs share.

    Attributes:
        function: The function to descend.
        start: The first point, [n].
        iterations: The number of steps.
        learning_rate: The rate η₀ of the first step.
        decay: k of the rate η_i = η₀ exp(-k i).

    >>> Plan(fx.functions.beale, (0.0, 0.5), iterations=1000, learning_rate=0.01).decay
    0.0
    """

    function: fx.functions.Function
    start: tuple[float, ...]
    iterations: int
    learning_rate: float
    decay: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """The runs of one rule.

    Attributes:
        values: f before every step and after the last one, [runs, iterations + 1].
        points: The points of these values, [runs, iterations + 1, 2]; None unless n = 2.
        last: The last point of each run, [runs, n].
    """

    values: np.ndarray
    points: np.ndarray | None
    last: np.ndarray

    @property
    def final(self) -> np.ndarray:
        """The last value of each run, [runs]; infinite where a run left the numbers, so that it ranks last."""
        return np.where(np.isfinite(self.values[:, -1]), self.values[:, -1], np.inf)

    @property
    def non_finite(self) -> int:
        """How many runs ended at a value that is not a number, or infinite."""
        return int(np.sum(np.isinf(self.final)))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per run, each the median of several single runs.

    Attributes:
        seconds: Those of the run.
        overhead: Those of the same run on f(x) = Σ x_i: what the loop and the random directions
            cost.
    """

    seconds: float
    overhead: float


Trace = tuple[jax.Array, jax.Array | None, jax.Array]


def one_run(plan: Plan, rule: fx.Rule) -> Callable[[jax.Array], Trace]:
    """Return the function from a key to (values, points or None, last point) of one run."""
    step = fx.value_and_grad(plan.function, rule)
    keep = len(plan.start) == 2

    def run(key: jax.Array) -> Trace:
        def body(x: jax.Array, per_step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            step_key, i = per_step
            value, gradient = step(step_key, x)
            rate = plan.learning_rate * jnp.exp(-plan.decay * i)
            return x - rate * gradient, (value, x if keep else None)

        keys, indices = (
            jax.random.split(key, plan.iterations),
            jnp.arange(plan.iterations, dtype=float),
        )
        last, (values, points) = jax.lax.scan(body, jnp.array(plan.start), (keys, indices))
        values = jnp.append(values, plan.function(last))
        return (
            values,
            None if points is None else jnp.concatenate([points, last[None]]),
            last,
        )

    return run


def descend(plan: Plan, rule: fx.Rule, keys: jax.Array) -> Descent:
    """Run gradient descent once for each key.

    Args:
        plan: What all runs share.
        rule: How the gradient is found.
        keys: One PRNG key per run, [runs].

    Returns:
        The values and points of all runs.

    >>> plan = Plan(fx.functions.beale, (0.0, 0.5), iterations=1000, learning_rate=0.01)
    >>> print(f"{descend(plan, fx.Backprop(), jax.random.split(jax.random.key(0), 1)).final[0]:.1e}")
    5.6e-05
    """
    values, points, last = jax.jit(jax.vmap(one_run(plan, rule)))(keys)
    return Descent(
        np.asarray(values),
        None if points is None else np.asarray(points),
        np.asarray(last),
    )


def measure(
    plan: Plan, rules: list[fx.Rule], key: jax.Array, repeats: int = REPEATS
) -> list[Timing]:
    """Measure the seconds of single runs under each rule, the rules taking turns.

    Example: `measure(plan, [fx.Backprop(), fx.WeightPerturbation()], key)[1].seconds`.
    """
    total = dataclasses.replace(plan.function, name="sum", formula=jnp.sum)
    plans = (plan, dataclasses.replace(plan, function=total))
    seconds = seconds_of([one_run(each, rule) for rule in rules for each in plans], key, repeats)
    return [Timing(*pair) for pair in zip(seconds[::2], seconds[1::2], strict=True)]


def seconds_of(
    programs: list[Callable[[jax.Array], Any]], key: jax.Array, repeats: int = REPEATS
) -> list[float]:
    """Return the median seconds of each program on that key, compiled, after one call that is not counted.

    The programs take turns, so that a slow moment of the machine does not fall on one of them
    alone.
    """
    compiled = [jax.jit(program).lower(key).compile() for program in programs]
    for program in compiled:
        jax.block_until_ready(program(key))
    taken = np.zeros((repeats, len(compiled)))
    for i in range(repeats):
        for j, program in enumerate(compiled):
            begin = time.perf_counter()
            jax.block_until_ready(program(key))
            taken[i, j] = time.perf_counter() - begin
    return np.median(taken, axis=0).tolist()
