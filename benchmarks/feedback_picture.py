"""Tables and pictures of the feedback benchmark, from its records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feedback_rules import METHODS
from feedback_train import CHUNK
from forwax.lab import style
from forwax.lab.report import Table

Records = Sequence[dict[str, Any]]
CURVES = {
    "backprop": "backprop",
    "the head alone": "muted",
    "activity noise, 1": "activity",
    "activity noise, 4": "low-rank",
    "activity noise, 4, own position": "exact",
    "direct feedback": "direct-feedback",
    "feedback alignment": "feedback",
    "FDFA, 4": "forward-16",
    "learned feedback, 1": "forward",
    'learned feedback, 1, chain="all"': "value",
}
SMOOTH = 3  # chunks


def runs(records: Records, task: str, rule: str) -> Records:
    """The runs with the most steps that a row has."""
    found = [
        r
        for r in records
        if r["kind"] == "run" and r["task"] == task and r["rule"] == rule
    ]
    most = max((r["steps"] for r in found), default=0)
    return [r for r in found if r["steps"] == most]


def flops(records: Records, task: str, rule: str) -> float:
    found = [r for r in records if r["kind"] == "arithmetic" and r["task"] == task]
    return next((r["flops"] for r in found if r["rule"] == rule), float("nan"))


def spread(values: Sequence[float | None], digits: int) -> str:
    """The mean and the range; a run that is not finite has none."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return f"{len(values) - len(finite)} of {len(values)} not finite"
    text = f"{np.mean(finite):.{digits}f}"
    if len(finite) > 1:
        text += f" ({min(finite):.{digits}f} to {max(finite):.{digits}f})"
    return text


def table(records: Records, task: str) -> str:
    """A line for each rule that has run."""
    is_language = task.startswith("lm")
    scored = "test loss" if is_language else "test error, %"
    rows: list[list[str]] = []
    backprop = flops(records, task, "backprop")
    for rule in METHODS:
        if found := runs(records, task, rule):
            rows.append(
                [
                    rule,
                    f"{found[0]['rate']:g}",
                    str(len(found)),
                    spread([r["last"] for r in found], 3),
                    spread([r["score"] for r in found], 3 if is_language else 2),
                    f"{flops(records, task, rule) / backprop:.2f}",
                ]
            )
    heads = ("rule", "rate", "seeds", "training loss", scored, "arithmetic of a step")
    return Table(heads, rows).markdown()


def cost_tables(records: Records) -> list[str]:
    """Time, arithmetic and temporaries over backprop's; the last record of each counts."""
    found = {(r["network"], r["rule"]): r for r in records if r["kind"] == "cost"}
    networks = list(dict.fromkeys(network for network, _ in found))
    texts: list[str] = []
    for quantity in ("time", "flops", "temporaries"):
        rows = [
            [rule, *(f"{found[network, rule][quantity]:.2f}" for network in networks)]
            for rule in dict.fromkeys(rule for _, rule in found)
        ]
        if rows:
            texts.append(
                Table((f"{quantity} over backprop's", *networks), rows).markdown()
            )
    return texts


def smoothed(losses: Sequence[float | None]) -> np.ndarray:
    """Running means of the training loss, as long as it is finite."""
    values = np.array([x for x in losses if x is not None])
    size = min(SMOOTH, len(values))
    return np.convolve(values, np.ones(size) / size, "valid")


def plot(axes: Axes, records: Records, task: str, by_arithmetic: bool) -> None:
    highest = 0.0
    for rule, colour in CURVES.items():
        for number, run in enumerate(runs(records, task, rule)):
            means = smoothed(run["losses"])
            first = len(run["losses"]) - len(means) + 1
            x = CHUNK * np.arange(first, first + len(means), dtype=float)
            if by_arithmetic:
                x *= flops(records, task, rule) / 1e9
            label = None if number else rule
            width = 1.8 if rule.startswith(("backprop", "learned")) else 1.1
            axes.plot(
                x, means, color=style.PALETTE[colour], label=label, linewidth=width
            )
            highest = max(highest, means[0])
    is_language = task.startswith("lm")
    axes.set(
        xlabel="arithmetic, Gflop" if by_arithmetic else "steps",
        ylabel="" if by_arithmetic else "training loss",
        xscale="log" if by_arithmetic else "linear",
        yscale="linear" if is_language else "log",
    )
    if is_language:
        axes.set_ylim(top=min(highest, 4.0))
    else:
        style.plain_numbers(axes.yaxis, "25")


@style.styled
def draw(records: Records, task: str) -> Figure:
    """The training loss against steps, and against arithmetic."""
    figure = style.new_figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    plot(left, records, task, by_arithmetic=False)
    plot(right, records, task, by_arithmetic=True)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure
