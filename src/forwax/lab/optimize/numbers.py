"""The numbers of ``forwax optimize``: what is kept as JSON, and the table that is printed."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import forwax as fx
from forwax.lab.optimize.descent import Descent, Plan, Timing

__all__ = ["make_table", "summarise", "write"]


def summarise(
    plan: Plan,
    rules: Mapping[str, fx.Rule],
    descents: Mapping[str, Descent],
    timings: Mapping[str, Timing],
    seed: int,
) -> dict[str, Any]:
    """Return every number of a comparison as a tree that JSON can hold; what is not finite becomes null.

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
    methods = {name: _method(plan, rules[name], descents[name], timings[name]) for name in rules}
    base = timings["backprop"].seconds
    for name, timing in timings.items():
        methods[name]["times_backprop"] = timing.seconds / base
    return {
        "function": plan.function.name,
        "n": len(plan.start),
        "minimum": plan.function.minimum,
        "start": list(plan.start),
        "iterations": plan.iterations,
        "learning_rate": plan.learning_rate,
        "decay": plan.decay,
        "runs": len(descents["backprop"].final),
        "seed": seed,
        "methods": methods,
        "device": jax.devices()[0].device_kind,
        "versions": {"forwax": fx.__version__, "jax": jax.__version__},
    }


def _method(plan: Plan, rule: fx.Rule, descent: Descent, timing: Timing) -> dict[str, Any]:
    """Return the numbers of one method."""
    distances = np.asarray(jax.vmap(plan.function.distance)(jnp.asarray(descent.last)))
    distances = np.where(np.isfinite(descent.final), distances, np.inf)
    return {
        "rule": repr(rule),
        "median": _finite(np.median(descent.final)),
        "low": _finite(descent.final.min()),
        "high": _finite(descent.final.max()),
        "final": [_finite(value) for value in descent.final],
        "distance": _finite(np.median(distances)),
        "non_finite_runs": descent.non_finite,
        "seconds": timing.seconds,
        "seconds_overhead": timing.overhead,
    }


def _finite(value: Any) -> float | None:
    """Return a Python number, or None where it is infinite or none."""
    return float(value) if math.isfinite(value) else None


def make_table(numbers: Mapping[str, Any]) -> Table:
    """Return the table that compares the methods, one column each.

    Example: `rich.print(make_table(numbers))`.
    """
    methods = numbers["methods"]
    table = Table(title=_title(numbers), title_justify="left", title_style="bold")
    table.add_column("")
    for name in methods:
        table.add_column(name if name == "backprop" else f"{name} gradient", justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("final f, median", lambda m: _show(m["median"])),
        (
            "final f, range",
            lambda m: " to ".join(dict.fromkeys(map(_show, (m["low"], m["high"])))),
        ),
        ("distance to nearest minimum", lambda m: _show(m["distance"])),
        ("runs not finite", lambda m: f"{m['non_finite_runs']} of {numbers['runs']}"),
        ("seconds per run", lambda m: f"{m['seconds']:.2g}"),
        ("the same for f = sum of x", lambda m: f"{m['seconds_overhead']:.2g}"),
        ("seconds / backprop's", lambda m: f"{m['times_backprop']:.2f}"),
    ]
    for title, cell in rows:
        lost = title == "runs not finite" and any(
            method["non_finite_runs"] for method in methods.values()
        )
        table.add_row(
            title,
            *(cell(method) for method in methods.values()),
            style="bold red" if lost else None,
        )
    return table


def _title(numbers: Mapping[str, Any]) -> str:
    """Return the line above the table."""
    decay = f" · exp(-{numbers['decay']:g} i)" if numbers["decay"] else ""
    return (
        f"{numbers['function']}, n = {numbers['n']}: {numbers['iterations']:,} iterations, "
        f"learning rate {numbers['learning_rate']:g}{decay}, {numbers['runs']} runs"
    )


def _show(value: float | None) -> str:
    """Return a number in three digits, or what stands for one that is not finite."""
    return "not finite" if value is None else f"{value:.3g}"


def write(numbers: Mapping[str, Any], path: Path) -> None:
    """Write the numbers as JSON, whole or not at all.

    Example: `write(numbers, Path("runs/optimize-beale.json"))`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
