"""`forwax compare`: the same model, data order and initial parameters under several rules.

First the time of a step is measured under all rules in turns, then each rule gets its learning
rate, then each seed is trained under each rule. Every finished part is a file in the comparison's
folder, so that a rerun skips it.
"""

import os
import time
from datetime import datetime
from itertools import product

from forwax.lab.compare import findings, rates, tables
from forwax.lab.compare.bench import Bench
from forwax.lab.compare.setup import Comparison, make_ready, part
from forwax.lab.keeping.disk import going_on
from forwax.lab.keeping.lock import writing
from forwax.lab.options.compare import CompareOptions
from forwax.lab.report import (
    Json,
    RowsByRule,
    machine,
    print_tables,
    write_json,
    write_text,
)


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
    folder = comparison.folder
    again = f"forwax compare --resume {folder}"
    try:
        with going_on(folder, again), writing(folder):
            results = compare(comparison)
            save(comparison, results)
    except KeyboardInterrupt:
        print(f"\nStopped; what is finished is kept. Go on with: {again}")
        return 130
    # a log has no width of its own; the tables need this much
    print_tables(*tables.make_tables(results))
    for note in tables.notes(results):
        print(f"- {note}")
    print(f"{time.perf_counter() - started:.0f} s. Results, table and figure: {folder}")
    return 0


def compare(comparison: Comparison) -> Json:
    """Do every part that is not done yet, and gather the results.

    Args:
        comparison: a comparison made ready.

    Returns:
        What results.json will hold.
    """
    options = comparison.options
    bench = Bench(**vars(comparison))
    folder = comparison.folder
    print(f"Folder: {folder}", flush=True)
    timing = part(folder, "timing", bench.timing)
    found = {
        name: each.learning_rate or 0.0 for name, each in comparison.settings.items()
    }
    searches: RowsByRule = {}
    if not options.paper:
        for name, suggested in found.items():

            def candidate(number: int, rate: float, name: str = name) -> Json:
                kept = f"search-{name}-{number}"
                return part(folder, kept, bench.candidate, name, number, rate)

            tried = rates.search(suggested, options.search_rates, candidate)
            note = rates.edge_note(tried)
            searches[name] = tried
            found[name] = best = rates.best_rate(rates.pairs(tried))
            told = f" ({note})" if note else ""
            print(f"{name}: learning rate {best:.3g}{told}", flush=True)
    runs: RowsByRule = {name: [] for name in found}
    for seed, (name, rate) in product(range(options.seeds), found.items()):
        run = part(folder, f"run-{name}-{seed}", bench.run, name, rate, seed)
        runs[name].append(run)
    return _facts(comparison) | findings.gather(
        comparison.rules, timing, searches, runs, options.target_loss
    )


def _facts(comparison: Comparison) -> Json:
    """Give what the results depend on."""
    options = comparison.options
    problem = comparison.problem
    search = {"candidates": options.search_rates, "steps": comparison.search_steps}
    return {
        "experiment": options.experiment,
        "config": options.configuration,
        "num_parameters": problem.num_parameters,
        "num_examples": problem.num_examples,
        "validation_examples": len(comparison.validation[0]),
        "test_examples": len(problem.test[0]),
        "data_checksum": problem.checksum,
        "steps": comparison.steps,
        "batch_size": next(iter(comparison.settings.values())).batch_size,
        "seeds": list(range(options.seeds)),
        "search": None if options.paper else search,
        "settings": {
            name: each.as_dict() for name, each in comparison.settings.items()
        },
        "cores": os.cpu_count(),
        "date": f"{datetime.now():%Y-%m-%d}",
        **machine(),
    }


def save(comparison: Comparison, results: Json) -> None:
    """Write the figure, the tables in markdown, and the results.

    results.json comes last, since it marks the comparison as finished.
    """
    # imported here: matplotlib takes a second that `forwax compare --help` need not wait for
    from forwax.lab import style
    from forwax.lab.pictures import comparison as picture

    folder = comparison.folder
    style.save(picture.draw(results), folder / "comparison.png", dpi=120)
    write_text(folder / "table.md", tables.markdown(results))
    write_json(folder / "results.json", results)
