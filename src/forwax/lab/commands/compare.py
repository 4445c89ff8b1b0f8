"""`forwax compare`: the same model, data order and initial parameters under several rules, side by side.

First the time of a step is measured under all rules in turns, then each rule gets its learning
rate, then each seed is trained under each rule. Every finished part is a file in the comparison's
folder, so that a rerun skips it.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime
from typing import Any

import jax
import numpy as np
from rich.console import Console

from forwax.lab.compare import findings, rates, tables
from forwax.lab.compare.bench import Bench
from forwax.lab.compare.options import CompareOptions
from forwax.lab.compare.setup import Comparison, make_ready
from forwax.lab.training.folder import write_json
from forwax.lab.training.session import versions

__all__ = ["CompareOptions", "compare", "run"]

RESULTS, TABLE, FIGURE = "results.json", "table.md", "comparison.png"


def run(options: CompareOptions) -> int:
    """Compare, print the table, and save results, table and figure.

    Args:
        options: the command's options.

    Returns:
        The exit code: 0 when done, 130 after Ctrl-C.

    Raises:
        UsageError: when the options do not go together.
        DataError: when the data cannot be loaded.

    Example:
        ```sh
        forwax compare digits --steps 2000 --seeds 2
        ```
    """
    started = time.perf_counter()
    comparison = make_ready(options)
    try:
        results = compare(comparison)
    except KeyboardInterrupt:
        print(
            f"\nStopped; what is finished is kept. Go on with: forwax compare --resume "
            f"{comparison.folder}"
        )
        return 130
    save(comparison, results)
    # a log has no width of its own; the tables need this much
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for table in tables.make_tables(results):
        console.print(table)
    for note in tables.notes(results):
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    print(f"{time.perf_counter() - started:.0f} s. Results, table and figure: {comparison.folder}")
    return 0


def compare(comparison: Comparison) -> dict[str, Any]:
    """Do every part that is not done yet, and gather the results.

    Args:
        comparison: a comparison made ready.

    Returns:
        What results.json will hold.
    """
    options, names = comparison.options, [rule.name for rule in comparison.rules]
    bench = Bench(comparison)
    print(f"Folder: {comparison.folder}", flush=True)
    timing = comparison.part("timing", bench.timing)
    bench.seconds = {name: float(np.median(values)) for name, values in timing["seconds"].items()}
    searches = {name: [] if options.paper else _search(bench, name) for name in names}
    rates = {name: _rate(comparison, name, searches[name]) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:
            make = lambda name=name, seed=seed: bench.run(name, rates[name], seed)  # noqa: E731
            runs[name].append(comparison.part(f"run-{name}-{seed}", make))
    return _facts(comparison) | findings.gather(
        comparison.rules, timing, searches, runs, options.target_loss
    )


def _search(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Find the candidates of one rule; each is a part of its own."""
    comparison = bench.comparison

    def candidate(number: int, rate: float) -> dict[str, Any]:
        return comparison.part(
            f"search-{name}-{number}", lambda: bench.candidate(name, number, rate)
        )

    suggested = comparison.settings[name].learning_rate
    assert suggested is not None
    candidates = rates.search(suggested, comparison.options.search_rates, candidate)
    note = rates.edge_note(candidates)
    best = rates.best_rate(rates.pairs(candidates))
    print(f"{name}: learning rate {best:.3g}" + (f" ({note})" if note else ""), flush=True)
    return candidates


def _rate(comparison: Comparison, name: str, candidates: list[dict[str, Any]]) -> float:
    rate = comparison.settings[name].learning_rate
    assert rate is not None
    return rates.best_rate(rates.pairs(candidates)) if candidates else rate


def _facts(comparison: Comparison) -> dict[str, Any]:
    """Give what the results depend on."""
    options = comparison.options
    return {
        "experiment": options.experiment,
        "config": comparison.configuration,
        "num_parameters": comparison.problem.num_parameters,
        "num_examples": len(comparison.problem.train[0]),
        "validation_examples": len(comparison.validation[0]),
        "test_examples": len(comparison.problem.test[0]),
        "data_checksum": comparison.problem.checksum,
        "steps": comparison.steps,
        "batch_size": next(iter(comparison.settings.values())).batch_size,
        "seeds": list(range(options.seeds)),
        "search": None
        if options.paper
        else {"candidates": options.search_rates, "steps": comparison.search_steps},
        "settings": {name: each.as_dict() for name, each in comparison.settings.items()},
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "date": f"{datetime.now():%Y-%m-%d}",
        "versions": versions(),
    }


def save(comparison: Comparison, results: dict[str, Any]) -> None:
    """Write the figure, the tables in markdown, and results.json last, since it marks the comparison as finished."""
    # imported here: matplotlib takes a second that `forwax compare --help` need not wait for
    from forwax.lab import style
    from forwax.lab.pictures import comparison as picture

    style.save(picture.draw(results), comparison.folder / FIGURE, dpi=120)
    (comparison.folder / TABLE).write_text(tables.markdown(results))
    write_json(comparison.folder / RESULTS, results)
