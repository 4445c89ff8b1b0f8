"""Gradient descent on a test function: every run's values, the seconds of one, and a table.

All iterations are one compiled `lax.scan`. The runs are computed together under `vmap`; the seconds
are those of single runs, compiled and warm, so that loss against seconds compares what a user of
one run would wait.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx
from forwax._reports.timing import interleaved, medians
from forwax.lab.report import Json, Table, finite, machine

NON_FINITE = "runs not finite"


@dataclass(frozen=True)
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


@dataclass(frozen=True, eq=False)
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
    def ranked(self) -> np.ndarray:
        """The values, infinite where they are no numbers, so that these rank last."""
        return np.where(np.isfinite(self.values), self.values, np.inf)

    @property
    def final(self) -> np.ndarray:
        """The last value of each run, [runs]; infinite where it is no number."""
        return self.ranked[:, -1]

    @property
    def non_finite(self) -> int:
        """How many runs ended at a value that is not a number, or infinite."""
        return int(np.sum(np.isinf(self.final)))


@dataclass(frozen=True)
class Timing:
    """Seconds per run, each the median of several single runs.

    Attributes:
        seconds: Those of the run.
        overhead: Those of the same run on f(x) = Σ x_i: what the loop and the random directions
            cost.
    """

    seconds: float
    overhead: float


Rule = fx.Rule | fx.GaussNewton
Descents = Mapping[str, Descent]
Timings = Mapping[str, Timing]


def one_run(plan: Plan, rule: Any) -> Callable[[Array], Any]:
    """Return the function from a key to (values, points or None, last point) of one run."""
    planar = len(plan.start) == 2
    start = jnp.array(plan.start)
    solver = None
    if isinstance(rule, fx.GaussNewton):
        solver = replace(rule, adapt=True).init(start)

    def step(carry: Any, per_step: Any) -> Any:
        key, i = per_step
        x, solver = carry
        if solver is None:
            rate = plan.learning_rate * jnp.exp(-plan.decay * i)
            value, gradient = fx.value_and_grad(plan.function, rule)(key, x)  # type: ignore
            after = x - rate * gradient
        else:
            half, after, solver = solver.step(plan.function.residuals)(key, x)
            value = 2 * half
        return (after, solver), (value, x if planar else None)

    def run(key: Array) -> Any:
        keys = jax.random.split(key, plan.iterations)
        numbers = jnp.arange(plan.iterations, dtype=float)
        (last, _), (values, points) = jax.lax.scan(
            step, (start, solver), (keys, numbers)
        )
        values = jnp.append(values, plan.function(last))
        return values, jnp.concatenate([points, last[None]]) if planar else None, last

    return run


def descend(plan: Plan, rule: Rule, keys: Array) -> Descent:
    """Run gradient descent once for each key.

    Args:
        plan: What all runs share.
        rule: How the gradient is found.
        keys: One PRNG key per run, [runs].

    Returns:
        The values and points of all runs.

    >>> plan = Plan(fx.functions.beale, (0.0, 0.5), iterations=1000, learning_rate=0.01)
    >>> runs = descend(plan, fx.Backprop(), jax.random.split(jax.random.key(0), 1))
    >>> print(f"{runs.final[0]:.1e}")
    5.6e-05
    """
    return Descent(*jax.device_get(jax.jit(jax.vmap(one_run(plan, rule)))(keys)))


def measure(plan: Plan, rules: Mapping[str, Rule], key: Array) -> Timings:
    """Measure the seconds of single runs under each rule, the rules taking turns.

    Example: `measure(plan, {"backprop": fx.Backprop()}, key)["backprop"].seconds`.
    """
    plans = (
        plan,
        replace(
            plan,
            function=replace(
                plan.function, name="sum", formula=jnp.sum, residuals=jnp.ravel
            ),
        ),
    )
    runs = [one_run(each, rule) for rule in rules.values() for each in plans]
    seconds = iter(seconds_of(runs, key))
    return {name: Timing(next(seconds), next(seconds)) for name in rules}


def seconds_of(
    programs: list[Callable[[Array], Any]], key: Array, repeats: int = 5
) -> list[float]:
    """Return the median seconds of each program on that key, compiled and warm, in turns."""
    calls = {
        str(i): partial(jax.jit(program), key) for i, program in enumerate(programs)
    }
    return list(medians(interleaved(calls, repeats)).values())


def summarise(
    plan: Plan,
    rules: Mapping[str, Rule],
    descents: Descents,
    timings: Timings,
    seed: int,
) -> Json:
    """Return every number of a comparison as JSON can hold it: what is not finite becomes null.

    Args:
        plan: What all runs share.
        rules: The rule of each method, backprop first.
        descents: The runs of each method.
        timings: The seconds of each method.
        seed: The seed of all runs.

    Returns:
        A dictionary with one entry per method under "methods".

    Example: `summarise(plan, rules, descents, timings, seed=0)["methods"]["forward"]["median"]`.
    """
    methods = {}
    for name, rule in rules.items():
        runs = descents[name]
        timing = timings[name]
        final = runs.final
        distances = jax.vmap(plan.function.distance)(jnp.asarray(runs.last))
        distances = np.where(np.isfinite(final), distances, np.inf)
        methods[name] = {
            "rule": repr(rule),
            "median": finite(np.median(final)),
            "low": finite(final.min()),
            "high": finite(final.max()),
            "final": list(map(finite, final)),
            "distance": finite(np.median(distances)),
            "non_finite_runs": runs.non_finite,
            "seconds": timing.seconds,
            "seconds_overhead": timing.overhead,
            "times_backprop": timing.seconds / timings["backprop"].seconds,
        }
    return {
        **vars(plan),
        "function": plan.function.name,
        "n": len(plan.start),
        "minimum": plan.function.minimum,
        "runs": len(descents["backprop"].final),
        "seed": seed,
        "methods": methods,
        **machine(),
    }


def make_table(numbers: Json) -> Table:
    """Return the table that compares the methods, one column each.

    Args:
        numbers: What `summarise` gives.
    """
    methods = numbers["methods"]
    columns = [_column(method, numbers["runs"]) for method in methods.values()]
    rows = [(title, *(each[title] for each in columns)) for title in columns[0]]
    has_lost_runs = any(method["non_finite_runs"] for method in methods.values())
    decay = f" · exp(-{numbers['decay']:g} i)" if numbers["decay"] else ""
    return Table(
        ("", *map(label, methods)),
        rows,
        title=f"{numbers['function']}, n = {numbers['n']}: {numbers['iterations']:,} iterations, "
        f"learning rate {numbers['learning_rate']:g}{decay}, {numbers['runs']} runs",
        alarming=[NON_FINITE] if has_lost_runs else (),
    )


def _column(method: Json, runs: int) -> dict[str, str]:
    """Return the cells of one method by the titles of their rows."""
    ends = dict.fromkeys([_show(method["low"]), _show(method["high"])])
    return {
        "final f, median": _show(method["median"]),
        "final f, range": " to ".join(ends),
        "distance to nearest minimum": _show(method["distance"]),
        NON_FINITE: f"{method['non_finite_runs']} of {runs}",
        "seconds per run": f"{method['seconds']:.2g}",
        "the same for f = sum of x": f"{method['seconds_overhead']:.2g}",
        "seconds / backprop's": f"{method['times_backprop']:.2f}",
    }


def _show(value: float | None) -> str:
    """Return a number in three digits, or what stands for one that is not finite."""
    return "not finite" if value is None else f"{value:.3g}"


def label(name: str) -> str:
    """Return what a method is called in tables and pictures.

    >>> label("backprop"), label("forward")
    ('backprop', 'forward gradient')
    """
    return name if name in ("backprop", "gauss-newton") else f"{name} gradient"
