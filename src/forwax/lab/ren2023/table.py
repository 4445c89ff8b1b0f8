"""The table of a reproduced column: ours beside the paper's."""

import os
import statistics
from collections.abc import Mapping, Sequence

from forwax.lab.catalogue.columns import Column
from forwax.lab.catalogue.names import Entry
from forwax.lab.catalogue.settings import Settings
from forwax.lab.ren2023.paper import reported
from forwax.lab.report import Json, Table

HEADINGS = (
    "method",
    "test error %",
    "training error %",
    "paper: test",
    "paper: training",
    "rate",
    "epochs",
    "s an epoch",
    "seeds",
)

Results = Mapping[str, Sequence[Json]]
"""From the name of a row to the summary.json of its seeds; rows that are not run are missing."""


def _row(column: Column, entry: Entry, runs: Sequence[Json]) -> tuple[str, ...]:
    paper = reported(column.name, entry.rule) or (None, None)
    kept = [run for run in runs if run["finite"]]
    lost = len(runs) - len(kept)
    return (
        entry.name,
        spread([run["test_error"] for run in kept])
        + (f" ({lost} not finite)" if lost else ""),
        spread([run["train_error"] for run in kept]),
        *("-" if error is None else f"{error:.2f}" for error in paper),
        f"{runs[0]['learning_rate']:g}" if runs else "-",
        f"{kept[0]['epochs'][-1]:g}" if kept else "-",
        f"{statistics.median(run['seconds_per_epoch'] for run in kept):.1f}"
        if kept
        else "-",
        str(len(runs)),
    )


def spread(values: Sequence[float]) -> str:
    """Give mean ± standard deviation over seeds.

    >>> spread([2.0, 3.0, 4.0]), spread([2.5]), spread([])
    ('3.00 ± 1.00', '2.50', '-')
    """
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def make_table(column: Column, entries: Sequence[Entry], results: Results) -> Table:
    """Make the table.

    Args:
        column: the column.
        entries: its rows.
        results: what is finished.
    """
    rows = [_row(column, entry, results.get(entry.name, ())) for entry in entries]
    return Table(HEADINGS, rows, column.title)


def facts(settings: Settings, summary: Json, held_out: int) -> str:
    """Give one line on what a table rests on.

    Args:
        settings: those of one of its runs.
        summary: of one of its runs.
        held_out: how many training images stand for the test set, or 0.
    """
    shown = "two views of each image"
    if settings.objective == "supervised":
        shown = (
            "images shifted by up to 2 pixels"
            if settings.augment
            else "no augmentation"
        )
    told = (
        f"Batches of {settings.batch_size}, {settings.optimizer}, {settings.schedule} decay to "
        f"zero, weight decay {settings.weight_decay:g}, {shown}; mean ± standard deviation over "
        f"seeds. Paper: Ren et al. 2023, arXiv 2210.03310. {summary['device']}, "
        f"{summary['num_devices']} device, {os.cpu_count()} cores, jax "
        f"{summary['versions']['jax']}."
    )
    if held_out:
        told += (
            f" Errors are on {held_out} training images that were held out, not on the "
            "test set."
        )
    return told
