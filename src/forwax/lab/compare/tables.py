"""The tables of a comparison, for the terminal and as markdown, from what results.json holds."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = (
    "rule",
    "learning rate",
    "training loss",
    "test accuracy",
    "ms a step",
    "× backprop",
    "temporaries, MiB",
    "steps to target",
    "seconds to target",
)
RATIO_COLUMNS = ("rule", "R", "R / R of backprop", "T / T of backprop")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Give the cells of the main table, one row a rule, in the order of `COLUMNS`."""
    return [_row(name, each) for name, each in results["rules"].items()]


def _row(name: str, each: dict[str, Any]) -> tuple[str, ...]:
    return (
        each["about"],
        number(each["learning_rate"]) + (" (edge)" if each["edge"] else ""),
        number(each["train_loss"])
        + (f" ({each['non_finite']} not finite)" if each["non_finite"] else ""),
        accuracy(each),
        number(1000 * each["seconds_per_step"]),
        "-" if each["time_ratio"] is None else f"{each['time_ratio']:.2f}",
        "-" if each["temporary_bytes"] is None else f"{each['temporary_bytes'] / 2**20:.1f}",
        number(each["steps_to_target"]),
        number(each["seconds_to_target"]),
    )


def ratio_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Give the cells of the table of the paper's ratios, in the order of `RATIO_COLUMNS`."""
    reference = results["rules"].get("backprop")
    return [
        (
            each["about"],
            f"{each['R']:.2f}",
            "-" if reference is None else f"{each['R'] / reference['R']:.3f}",
            number(each["T_ratio"]),
        )
        for each in results["rules"].values()
    ]


def accuracy(each: dict[str, Any]) -> str:
    """Give the test accuracy in percent, with the standard deviation over seeds where there are several.

    >>> accuracy({"test_accuracy": 0.9512, "test_accuracy_sd": 0.004})
    '95.1 ± 0.4 %'
    """
    spread = "" if each["test_accuracy_sd"] is None else f" ± {100 * each['test_accuracy_sd']:.1f}"
    return f"{100 * each['test_accuracy']:.1f}{spread} %"


def number(value: float | str | None) -> str:
    """Write a number with three digits; text stays, and a missing number is a hyphen.

    >>> number(0.012345), number(1234), number(7.7e14), number("not reached"), number(None)
    ('0.0123', '1,234', '7.7e+14', 'not reached', '-')
    """
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) or 100 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e6 else f"{value:#.3g}"


def make_tables(results: dict[str, Any]) -> list[Table]:
    """Make the tables for the terminal."""
    tables = []
    for title, columns, cells in _contents(results):
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in cells:
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(results: dict[str, Any]) -> str:
    """Write the tables and the notes in markdown."""
    parts = []
    for title, columns, cells in _contents(results):
        lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *cells]
        parts.append(f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    found = notes(results)
    if found:
        parts.append("\n".join(f"- {note}" for note in found))
    return "\n\n".join(parts) + "\n"


def _contents(
    results: dict[str, Any],
) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    return [
        (_title(results), COLUMNS, rows(results)),
        (
            "The ratios of Baydin et al. 2022: R, a step's time over that of evaluating the loss "
            "once "
            f"({1000 * results['loss_seconds']:.3g} ms); T, the time to reach backprop's best "
            f"validation loss",
            RATIO_COLUMNS,
            ratio_rows(results),
        ),
    ]


def _title(results: dict[str, Any]) -> str:
    seeds, target = len(results["seeds"]), results["target_loss"]
    goal = (
        "no target loss"
        if target is None
        else f"target: validation loss {target:g}, {results['target_is']}"
    )
    return (
        f"{results['experiment']}: {results['num_parameters']:,} parameters, {results['steps']:,} "
        f"steps of "
        f"{results['batch_size']} examples, {seeds} seed{'' if seeds == 1 else 's'}; {goal}"
    )


def notes(results: dict[str, Any]) -> list[str]:
    """Give a sentence on the search, on each choice at an edge, and on each rule that did not stay finite."""
    found = []
    if results["search"] is None:
        found.append("No rate was searched: every rule uses the rate of the paper.")
    else:
        candidates, steps = results["search"]["candidates"], results["search"]["steps"]
        found.append(
            f"Each rule's rate is the best of {candidates} by validation loss (in brackets), each "
            f"tried for {steps:,} "
            "steps."
        )
    for each in results["rules"].values():
        if each["search"]:
            found.append(f"{each['about']} tried {_tried(each['search'])}.")
        if each["edge"]:
            found.append(f"{each['about']}: {each['edge']}.")
        if each["non_finite"]:
            found.append(
                f"{each['about']}: {each['non_finite']} of {len(each['runs'])} runs turned "
                f"non-finite; their last "
                "finite parameters were tested."
            )
    return found


def _tried(candidates: list[dict[str, Any]]) -> str:
    """Tell every candidate's rate with its validation loss, from the smallest rate on."""
    tried = sorted((each["learning_rate"], each["validation_loss"]) for each in candidates)
    return ", ".join(
        f"{number(rate)} ({'not finite' if loss is None else number(loss)})" for rate, loss in tried
    )
