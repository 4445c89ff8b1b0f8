"""The figure of a comparison: validation loss against steps and against seconds, each seed thin, the median thick."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forwax.lab import style
from forwax.lab.compare import tables


@style.styled
def draw(results: dict[str, Any]) -> Figure:
    """Draw the two panels.

    Args:
        results: what results.json holds.

    Returns:
        A figure; `style.save` writes it.
    """
    figure = style.new_figure(10, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for each in results["rules"].values():
        _draw_rule(left, each, 1.0)
        _draw_rule(right, each, each["seconds_per_step"])
    left.set(xlabel="steps", ylabel="validation loss", xscale="log")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _set_loss_axis(left, results)
    right.set(xlabel="seconds of training (steps × median time of a step)", xscale="log")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        _target(axes, results["target_loss"])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2))
    figure.suptitle(_title(results), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def _draw_rule(axes: Axes, each: dict[str, Any], scale: float) -> None:
    for run in each["runs"] if len(each["runs"]) > 1 else []:
        axes.plot(
            *_points(run, scale),
            color=each["colour"],
            linestyle=each["dashes"],
            alpha=0.35,
            linewidth=0.7,
        )
    lost = (
        f" ({each['non_finite']} of {len(each['runs'])} not finite)" if each["non_finite"] else ""
    )
    label = f"{each['about']}: {tables.accuracy(each)} test accuracy{lost}"
    look = {"color": each["colour"], "linestyle": each["dashes"], "linewidth": 2.2}
    axes.plot(*_points(each["curve"], scale), **look, label=label)


def _points(curve: dict[str, Any], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the finite points of a curve; step 0 has no place on a logarithmic axis and is left out."""
    kept = [
        (scale * step, loss)
        for step, loss in zip(curve["steps"], curve["validation_losses"], strict=True)
        if loss is not None and step
    ]
    points = np.array(kept or [(np.nan, np.nan)], dtype=float)
    return points[:, 0], points[:, 1]


def _set_loss_axis(axes: Axes, results: dict[str, Any]) -> None:
    """Show the losses from the least to somewhat above the first, whatever a diverging run does."""
    curves = [each["curve"]["validation_losses"] for each in results["rules"].values()]
    low = min((loss for curve in curves for loss in curve if loss), default=0.1)
    high = max((curve[0] for curve in curves if curve and curve[0]), default=10.0)
    if high < 4 * low:  # a logarithmic axis would have hardly a number on it
        axes.set_ylim(low - 0.15 * (high - low), high + 0.3 * (high - low))
        return
    axes.set(yscale="log", ylim=(0.8 * low, 1.3 * high))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def _target(axes: Axes, target: float | None) -> None:
    if target is not None:
        axes.axhline(target, color=style.PALETTE["muted"], linestyle=":", linewidth=1)
        place = axes.get_yaxis_transform()
        axes.text(
            0.01,
            target,
            f"target {target:g}",
            color=style.PALETTE["muted"],
            fontsize=8,
            va="bottom",
            transform=place,
        )


def _title(results: dict[str, Any]) -> str:
    rates = "the paper's rates" if results["search"] is None else "each rule at its own tuned rate"
    return f"{results['experiment']}, batch {results['batch_size']}: {rates}"
