"""Runs of a comparison that turned non-finite, or ended no better than they began."""

from forwax.lab.report import Json, Rows


def lost_runs(runs: Rows) -> dict[str, int]:
    """Count them.

    >>> lost_runs([{"finite": True, "validation_losses": [2.3, 5.0]}])
    {'non_finite': 0, 'diverged': 1}
    """
    finite = [run for run in runs if run["finite"]]
    # a loss that is itself not finite is kept as None
    ends = [
        (run["validation_losses"][0], run["validation_losses"][-1]) for run in finite
    ]
    diverged = sum(None in pair or pair[-1] >= pair[0] for pair in ends)
    return {"non_finite": len(runs) - len(finite), "diverged": diverged}


def mark(each: Json) -> str:
    """What stands behind the training loss of a rule.

    >>> mark({"non_finite": 1, "diverged": 2})
    ' (1 not finite) (2 diverged)'
    """
    counts = {"not finite": each["non_finite"], "diverged": each["diverged"]}
    return "".join(f" ({count} {what})" for what, count in counts.items() if count)


def notes_on_lost(each: Json) -> list[str]:
    """The sentences below the table.

    >>> notes_on_lost({"about": "BP", "non_finite": 0, "diverged": 2, "runs": [1, 2, 3]})
    ['BP: 2 of 3 runs diverged: their validation loss ended no lower than it began.']
    """
    among = f"of {len(each['runs'])} runs"
    found: list[str] = []
    if each["non_finite"]:
        found.append(
            f"{each['about']}: {each['non_finite']} {among} turned non-finite; their last finite "
            "parameters were tested."
        )
    if each["diverged"]:
        found.append(
            f"{each['about']}: {each['diverged']} {among} diverged: their validation loss ended no "
            "lower than it began."
        )
    return found
