"""The picture of a reproduced column: test error against epochs, one line a method."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from forwax.lab import style
from forwax.lab.catalogue.columns import Column, row_of
from forwax.lab.catalogue.names import Entry
from forwax.lab.ren2023.table import Results
from forwax.lab.report import Json
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
    for entry in entries:
        runs = [run for run in results.get(entry.name, ()) if run["finite"]]
        if runs:
            count = min(len(run["epochs"]) for run in runs)
            axes.plot(
                runs[0]["epochs"][:count],
                np.mean([run["test_errors"][:count] for run in runs], axis=0),
                label=entry.name,
                **_look(entry),
            )
    axes.set(xlabel="epochs", ylabel="test error, %", xscale="log", yscale="log")
    style.plain_numbers(axes.xaxis)
    style.plain_numbers(axes.yaxis, minor_digits="235")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right center")
    style.headline(figure, column.title)
    return figure


def _look(entry: Entry) -> Json:
    reading = ren2023.READINGS[entry.rule]
    number = entry.num_tangents or 1
    look = {
        "color": style.PALETTE[_COLOURS.get(reading.kind, "activity")],
        "linestyle": _DASHES[reading.losses],
        "linewidth": 1.5,
        "alpha": 1.0 if entry.name == row_of(entry) else 0.4,
    }
    if number > 1:
        look |= {
            "linewidth": 2.2,
            "marker": f"${number}$",
            "markersize": 8,
            "markevery": 0.2,
        }
    return look
