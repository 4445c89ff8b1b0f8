"""The table of a reproduced column: ours beside the paper's, for the terminal and as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from forwax.lab.catalogue.columns import Column
from forwax.lab.catalogue.entries import Entry
from forwax.lab.ren2023.paper import reported

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

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""From the name of a row to the summaries of its seeds; rows that are not run yet are missing."""


def rows(column: Column, entries: Sequence[Entry], results: Results) -> list[tuple[str, ...]]:
    """Give the cells, in the order of `HEADINGS`.

    Args:
        column: the column.
        entries: its rows.
        results: what is finished.
    """
    return [_row(column, entry, results.get(entry.name, ())) for entry in entries]


def _row(column: Column, entry: Entry, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    paper = reported(column.name, entry.rule)
    lost = sum(not run["finite"] for run in runs)
    kept = [run for run in runs if run["finite"]]
    pace = [run["seconds_per_epoch"] for run in kept]
    return (
        entry.name,
        spread([run["test_error"] for run in kept]) + (f" ({lost} not finite)" if lost else ""),
        spread([run["train_error"] for run in kept]),
        "-" if paper is None else f"{paper.test:.2f}",
        "-" if paper is None or paper.train is None else f"{paper.train:.2f}",
        f"{runs[0]['learning_rate']:g}" if runs else "-",
        f"{kept[0]['epochs'][-1]:g}" if kept else "-",
        f"{statistics.median(pace):.1f}" if pace else "-",
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
    """Make the table for the terminal."""
    table = Table(title=column.title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows(column, entries, results):
        table.add_row(*row)
    return table


def markdown(column: Column, entries: Sequence[Entry], results: Results, facts: str) -> str:
    """Write the table and what it rests on as markdown.

    Args:
        column: the column.
        entries: its rows.
        results: what is finished.
        facts: one line on the machine and the settings.
    """
    lines = [
        f"**{column.title}**",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- |" + " ---: |" * (len(HEADINGS) - 1),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(column, entries, results)]
    return "\n".join([*lines, "", facts, ""])


def facts(column: Column, settings: Any, summary: Mapping[str, Any], cores: int | None) -> str:
    """Give one line on what a table rests on.

    Args:
        column: the column.
        settings: those of one of its runs.
        summary: of one of its runs.
        cores: of the machine.
    """
    shifts = "images shifted by up to 2 pixels" if settings.augment else "no augmentation"
    shown = shifts if settings.objective == "supervised" else "two views of each image"
    return (
        f"Batches of {settings.batch_size}, {settings.optimizer}, {settings.schedule} decay to "
        f"zero, "
        f"weight decay {settings.weight_decay:g}, {shown}; mean ± standard deviation over seeds. "
        f"Paper: Ren et al. "
        f"2023, arXiv 2210.03310. {summary['device']}, {summary['num_devices']} device, {cores} "
        f"cores, jax "
        f"{summary['versions']['jax']}."
    )
