"""The tables of a comparison, for the terminal and as markdown, from what results.json holds."""

import math

from forwax.lab.compare.lost import mark, notes_on_lost
from forwax.lab.compare.rates import pairs
from forwax.lab.report import Json, Table

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


def _row(each: Json) -> tuple[str, ...]:
    """Give the cells of one rule, in the order of `COLUMNS`."""
    temporaries = each["temporary_bytes"]
    return (
        each["about"],
        number(each["learning_rate"]) + (" (edge)" if each["edge"] else ""),
        number(each["train_loss"]) + mark(each),
        accuracy(each),
        number(1000 * each["seconds_per_step"]),
        _fixed(each["time_ratio"], 2),
        _fixed(temporaries and temporaries / 2**20, 1),
        number(each["steps_to_target"]),
        number(each["seconds_to_target"]),
    )


def ratio_rows(results: Json) -> list[tuple[str, ...]]:
    """Give the cells of the table of the paper's ratios, in the order of `RATIO_COLUMNS`."""
    rules = results["rules"]
    reference = rules.get("backprop", {}).get("R")
    return [
        (
            each["about"],
            _fixed(each["R"], 2),
            _fixed(reference and each["R"] / reference, 3),
            number(each["T_ratio"]),
        )
        for each in rules.values()
    ]


def accuracy(each: Json) -> str:
    """Give the test accuracy in percent, with the standard deviation over several seeds.

    >>> accuracy({"test_accuracy": 0.9512, "test_accuracy_sd": 0.004})
    '95.1 ± 0.4 %'
    """
    spread = (
        ""
        if each["test_accuracy_sd"] is None
        else f" ± {100 * each['test_accuracy_sd']:.1f}"
    )
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


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def make_tables(results: Json) -> list[Table]:
    """Make the table of all rules, and that of the paper's ratios."""
    seeds = len(results["seeds"])
    target = results["target_loss"]
    goal = "no target loss"
    if target is not None:
        goal = f"target: validation loss {target:g}, {results['target_is']}"
    title = (
        f"{results['experiment']}: {results['num_parameters']:,} parameters, "
        f"{results['steps']:,} steps of {results['batch_size']} examples, {seeds} "
        f"seed{'' if seeds == 1 else 's'}; {goal}"
    )
    ratios = (
        "The ratios of Baydin et al. 2022: R, a step's time over that of evaluating the loss once "
        f"({1000 * results['loss_seconds']:.3g} ms); T, the time to reach backprop's best "
        "validation loss"
    )
    return [
        Table(COLUMNS, [_row(each) for each in results["rules"].values()], title),
        Table(RATIO_COLUMNS, ratio_rows(results), ratios),
    ]


def markdown(results: Json) -> str:
    """Write the tables and the notes in markdown."""
    parts = [f"{table.title}\n\n{table.markdown()}" for table in make_tables(results)]
    parts.append("\n".join(f"- {note}" for note in notes(results)))
    return "\n\n".join(parts) + "\n"


def notes(results: Json) -> list[str]:
    """Say what was searched, which choices lie at an edge, and which rules did not stay finite."""
    search = results["search"]
    found = ["No rate was searched: every rule uses the rate of the paper."]
    if search is not None:
        found = [
            f"Each rule's rate is the best of {search['candidates']} by validation loss (in "
            f"brackets), each tried for {search['steps']:,} steps."
        ]
    for each in results["rules"].values():
        if each["search"]:
            tried = ", ".join(
                f"{number(rate)} ({'not finite' if loss == math.inf else number(loss)})"
                for rate, loss in sorted(pairs(each["search"]))
            )
            found.append(f"{each['about']} tried {tried}.")
        if each["edge"]:
            found.append(f"{each['about']}: {each['edge']}.")
        found += notes_on_lost(each)
    return found
