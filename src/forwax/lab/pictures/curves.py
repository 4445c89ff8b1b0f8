"""The picture of one run: training loss and test accuracy against steps and against seconds."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forwax.lab import style
from forwax.lab.report import Rows

Columns = dict[str, np.ndarray]


@style.styled
def draw_curves(
    rows: Rows,
    title: str,
    colour: str = style.PALETTE["forward"],
    part: str = "test",
) -> Figure:
    """Draw loss (above) and accuracy (below) against steps (left) and seconds (right).

    Args:
        rows: the lines of metrics.jsonl.
        title: the heading.
        colour: the colour of the rule.
        part: on what examples the dots' accuracy is.

    Returns:
        A figure; `style.save` writes it.

    >>> rows = [{"step": 1, "loss": 2.0, "accuracy": 0.1, "seconds": 0.1}]
    >>> len(draw_curves(rows, "a run").axes)
    4
    """
    figure = style.new_figure(9, 5.6)
    (loss, loss_in_time), (accuracy, accuracy_in_time) = figure.subplots(
        2, 2, sharex="col", sharey="row"
    )
    train = _columns(rows, "loss", "accuracy")
    test = _columns(rows, f"{part}_accuracy")
    _draw_loss(loss, train, "step", colour)
    _draw_loss(loss_in_time, train, "seconds", colour)
    _draw_accuracy(accuracy, train, test, "step", colour)
    _draw_accuracy(accuracy_in_time, train, test, "seconds", colour)
    loss.set_ylabel("training loss")
    loss_in_time.legend(loc="upper right")
    accuracy.set(xlabel="steps", ylabel="accuracy")
    accuracy.xaxis.set_major_formatter("{x:,.0f}")
    accuracy_in_time.set_xlabel("seconds of training")
    accuracy_in_time.legend(loc="lower right")
    style.headline(figure, title)
    return figure


def _draw_loss(axes: Axes, train: Columns, axis: str, colour: str) -> None:
    x = train[axis]
    loss = train["loss"]
    axes.plot(x, loss, color=colour, alpha=0.18, linewidth=0.6, label="one batch")
    axes.plot(x, smooth(loss), color=colour, label="mean of neighbours")
    if len(loss) and np.nanmin(loss) > 0:
        axes.set_yscale("log")


def _draw_accuracy(
    axes: Axes, train: Columns, test: Columns, axis: str, colour: str
) -> None:
    smoothed = smooth(train["accuracy"])
    axes.plot(train[axis], smoothed, color=style.MUTED, linewidth=1, label="training")
    (name,) = test.keys() - {"step", "seconds"}
    points = np.stack([test[axis], test[name]])
    label = name.partition("_")[0]
    axes.plot(*points, color=colour, marker="o", markersize=3.5, label=label)
    axes.set_ylim(0, 1.02)
    for x, accuracy in points.T[-1:]:
        axes.annotate(
            f"{accuracy:.1%}",
            (x, accuracy),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
        )


def _columns(rows: Rows, *names: str) -> Columns:
    """Gather the rows that have all of the named values into arrays."""
    names = ("step", "seconds", *names)
    kept = [row for row in rows if row.keys() >= {*names}]
    return {name: np.array([row[name] for row in kept], dtype=float) for name in names}


def smooth(values: np.ndarray) -> np.ndarray:
    """Average each value with its neighbours within a hundredth of the length.

    Beyond an end the values are mirrored in it: a curve starts and ends where its data do.

    >>> smooth(np.array([1.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    reach = len(values) // 100
    window = np.ones(2 * reach + 1)
    longer = np.pad(values, reach, "reflect", reflect_type="odd")
    return np.convolve(longer, window / len(window), "valid") if reach else values
