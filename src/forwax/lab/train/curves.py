"""The picture of one run: training loss and test accuracy against steps and against seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forwax.lab import style


@style.styled
def draw_curves(
    rows: list[dict[str, Any]], title: str, colour: str = style.PALETTE["forward"]
) -> Figure:
    """Draw four panels: the loss above, the accuracy below; against steps on the left, seconds on the right.

    Args:
        rows: the lines of metrics.jsonl.
        title: the heading.
        colour: the colour of the rule.

    Returns:
        A figure; `style.save` writes it.

    >>> rows = [{"step": 1, "loss": 2.0, "accuracy": 0.1, "seconds": 0.1}]
    >>> len(draw_curves(rows, "a run").axes)
    4
    """
    figure = style.new_figure(9, 5.6)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    train, test = _columns(rows, "loss"), _columns(rows, "test_accuracy")
    for column, axis in enumerate(("step", "seconds")):
        _draw_loss(panels[0, column], train, axis, colour)
        _draw_accuracy(panels[1, column], train, test, axis, colour)
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("accuracy")
    panels[1, 0].set_xlabel("steps")
    panels[1, 1].set_xlabel("seconds of training")
    panels[0, 1].legend(loc="upper right")
    panels[1, 1].legend(loc="lower right")
    panels[1, 0].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def save_curves(
    rows: list[dict[str, Any]],
    title: str,
    path: Path,
    colour: str = style.PALETTE["forward"],
) -> None:
    """Draw the picture and save it in one move; see `draw_curves`."""
    style.save(draw_curves(rows, title, colour), path)


def _draw_loss(axes: Axes, train: dict[str, np.ndarray], axis: str, colour: str) -> None:
    axes.plot(
        train[axis],
        train["loss"],
        color=colour,
        alpha=0.18,
        linewidth=0.6,
        label="one batch",
    )
    axes.plot(train[axis], smooth(train["loss"]), color=colour, label="mean of neighbours")
    if len(train["loss"]) and np.nanmin(train["loss"]) > 0:
        axes.set_yscale("log")


def _draw_accuracy(
    axes: Axes,
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    axis: str,
    colour: str,
) -> None:
    axes.plot(
        train[axis],
        smooth(train["accuracy"]),
        color=style.PALETTE["muted"],
        linewidth=1,
        label="training",
    )
    axes.plot(
        test[axis],
        test["test_accuracy"],
        color=colour,
        marker="o",
        markersize=3.5,
        label="test",
    )
    axes.set_ylim(0, 1.02)
    if len(test["test_accuracy"]):
        last = test["test_accuracy"][-1]
        axes.annotate(
            f"{last:.1%}",
            (test[axis][-1], last),
            (0, -14),
            textcoords="offset points",
            ha="right",
        )


def _columns(rows: list[dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Gather the rows that have the named value into arrays."""
    kept = [row for row in rows if name in row]
    names = ("step", "seconds", "loss", "accuracy") if name == "loss" else ("step", "seconds", name)
    return {each: np.array([row[each] for row in kept], dtype=float) for each in names}


def smooth(values: np.ndarray) -> np.ndarray:
    """Average each value with its neighbours within a hundredth of the length; the ends use fewer.

    >>> smooth(np.array([1.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    reach = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)
