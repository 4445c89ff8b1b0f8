"""The figure of a comparison: validation loss against steps and seconds, the median thick."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forwax.lab import style
from forwax.lab.compare import tables
from forwax.lab.report import Json


@style.styled
def draw(results: Json) -> Figure:
    """Draw the two panels, each seed thin and the median over seeds thick.

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
    left.xaxis.set_major_formatter("{x:,.0f}")
    _set_loss_axis(left, results)
    right.set(
        xlabel="seconds of training (steps × median time of a step)",
        xscale="log",
    )
    style.plain_numbers(right.xaxis)
    target = results["target_loss"]
    if target is not None:
        for axes in (left, right):
            axes.axhline(target, color=style.MUTED, linestyle=":", linewidth=1)
            # 0.01 of the width, at the target's height
            axes.text(
                0.01,
                target,
                f"target {target:g}",
                color=style.MUTED,
                fontsize=8,
                va="bottom",
                clip_on=True,
                transform=axes.get_yaxis_transform(),
            )
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
    )
    rates = (
        "the paper's rates"
        if results["search"] is None
        else "each rule at its own tuned rate"
    )
    style.headline(
        figure, f"{results['experiment']}, batch {results['batch_size']}: {rates}"
    )
    return figure


def _draw_rule(axes: Axes, each: Json, scale: float) -> None:
    look = {"color": each["colour"], "linestyle": each["dashes"]}
    count = len(each["runs"])
    if count > 1:
        for run in each["runs"]:
            axes.plot(*_points(run, scale), alpha=0.35, linewidth=0.7, **look)
    label = f"{each['about']}: {tables.accuracy(each)} test accuracy"
    if each["non_finite"]:
        label += f" ({each['non_finite']} of {count} not finite)"
    axes.plot(*_points(each["curve"], scale), linewidth=2.2, label=label, **look)


def _points(curve: Json, scale: float) -> np.ndarray:
    """Give a curve's steps times the scale, and the finite ones of its losses, [2, steps]."""
    points = np.array([curve["steps"], curve["validation_losses"]], dtype=float)
    # a logarithmic axis has no place for step 0, and a line goes on over what is left out
    return points[:, np.isfinite(points[1]) & (points[0] > 0)] * [[scale], [1.0]]


def _set_loss_axis(axes: Axes, results: Json) -> None:
    """Show the losses from the least to somewhat above the first, whatever a diverging run does."""
    curves = [each["curve"]["validation_losses"] for each in results["rules"].values()]
    low = min((loss for curve in curves for loss in curve if loss), default=0.1)
    high = max((curve[0] for curve in curves if curve and curve[0]), default=10.0)
    if high < 4 * low:  # a logarithmic axis would have hardly a number on it
        room = high - low or high  # where all losses are equal
        axes.set_ylim(low - 0.15 * room, high + 0.3 * room)
        return
    axes.set(yscale="log", ylim=(0.8 * low, 1.3 * high))
    style.plain_numbers(axes.yaxis, minor_digits="25")
