"""The picture of a reproduced column: test error against epochs, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forwax.lab import style
from forwax.lab.ren2023.columns import Column
from forwax.lab.ren2023.entries import Entry
from forwax.lab.ren2023.table import Results
from forwax.models import ren2023

_COLOURS = {
    "BP": "backprop",
    "FA": "finite-difference",
    "FG-W": "forward-16",
    "FG-A": "forward",
}
_DASHES = {"global": ":", "local": "--", "greedy": "-"}


@style.styled
def draw(column: Column, entries: Sequence[Entry], results: Results) -> Figure:
    """Draw the mean over seeds of each finished row.

    Colours tell the rule, dashes where the losses sit, width and marks how many noises, paleness
    another kind of noise.

    Args:
        column: the column.
        entries: its rows.
        results: what is finished.

    Returns:
        A figure; `style.save` writes it.
    """
    figure = style.new_figure(8, 5)
    axes = figure.subplots()
    for entry in dict.fromkeys(entries):
        runs = [run for run in results.get(entry.name, ()) if run["finite"]]
        if runs:
            axes.plot(*_mean_curve(runs), label=entry.name, **_look(entry))
    axes.set(xlabel="epochs", ylabel="test error, %", xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""
    )
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right center")
    figure.suptitle(column.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _mean_curve(runs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    count = min(len(run["epochs"]) for run in runs)
    return np.array(runs[0]["epochs"][:count]), np.mean(
        [run["test_errors"][:count] for run in runs], axis=0
    )


def _look(entry: Entry) -> dict[str, Any]:
    reading = ren2023.READINGS[entry.rule]
    colour = style.PALETTE[_COLOURS.get(reading.kind, "activity")]
    number = entry.num_tangents or 1
    plain = entry.name == entry.row
    look = {
        "color": colour,
        "linestyle": _DASHES[reading.losses],
        "linewidth": 2.2 if number > 1 else 1.5,
    }
    look |= {} if plain else {"alpha": 0.4}
    return look | (
        {"marker": f"${number}$", "markersize": 8, "markevery": 0.2} if number > 1 else {}
    )
