"""What a comparison found, as one dictionary for results.json; table and figure read nothing else.

All losses that are reached or not are validation losses, the median over the seeds. The target is
reached once the loss stays at or below it: a curve that touches it on its way up again has not
reached it. Seconds are steps times the median time of a step, measured in turns with the other
rules, so that what else the machine did meets all of them alike. The ratios are those of Baydin et
al. 2022: R is the time of a step over that of evaluating the loss once; T_f/T_b compares the times
to touch backprop's best validation loss.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from forwax.lab.compare.named_rules import NamedRule
from forwax.lab.compare.rates import edge_note
from forwax.lab.compare.timing import LOSS

NOT_REACHED = "not reached"


def gather(
    rules: list[NamedRule],
    timing: dict[str, Any],
    searches: dict[str, list[dict[str, Any]]],
    runs: dict[str, list[dict[str, Any]]],
    target_loss: float | None = None,
) -> dict[str, Any]:
    """Gather the parts of a comparison.

    Args:
        rules: the rules in their order.
        timing: the timing part: seconds by rule and round, and temporary bytes by rule.
        searches: the candidates of each rule; empty where the rate was given.
        runs: the runs of each rule, one a seed.
        target_loss: the validation loss to reach; by default the one that the slowest rule that
            stayed finite ends at.

    Returns:
        A dictionary that JSON can hold: no infinities, and "not reached" in place of a number.
    """
    seconds = {name: float(np.median(values)) for name, values in timing["seconds"].items()}
    found = {
        rule.name: _of_rule(
            rule,
            seconds,
            timing["temporary_bytes"],
            searches.get(rule.name, []),
            runs[rule.name],
        )
        for rule in rules
    }
    target = default_target(found) if target_loss is None else target_loss
    reference = found.get("backprop")
    for each in found.values():
        each |= _reached(
            each,
            None if target is None else settled_step(each["curve"], target),
            "target",
        )
        each |= _against(each, reference)
    return {
        "loss_seconds": seconds[LOSS],
        "target_loss": target,
        "target_is": "given"
        if target_loss is not None
        else "the loss that the slowest rule that stayed finite ends at",
        "rules": found,
    }


def _of_rule(
    rule: NamedRule,
    seconds: dict[str, float],
    temporary_bytes: dict[str, int | None],
    candidates: list[dict[str, Any]],
    runs: list[dict[str, Any]],
) -> dict[str, Any]:
    accuracies = [run["test_accuracy"] for run in runs]
    train_losses = [math.nan if run["train_loss"] is None else run["train_loss"] for run in runs]
    steps, losses = median_curve(runs)
    best = min(losses, default=math.inf)
    return {
        "about": rule.about,
        "colour": rule.colour,
        "dashes": rule.dashes,
        "learning_rate": runs[0]["learning_rate"],
        "search": candidates,
        "edge": edge_note(candidates) if candidates else None,
        "seconds_per_step": seconds[rule.name],
        "R": seconds[rule.name] / seconds[LOSS],
        "temporary_bytes": temporary_bytes[rule.name],
        "train_loss": _number(np.mean(train_losses)),
        "test_accuracy": float(np.mean(accuracies)),
        "test_accuracy_sd": float(np.std(accuracies, ddof=1)) if len(runs) > 1 else None,
        "non_finite": sum(not run["finite"] for run in runs),
        "best_validation_loss": _number(best),
        "curve": {
            "steps": steps,
            "validation_losses": [_number(loss) for loss in losses],
        },
        "runs": runs,
    }


def median_curve(runs: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Give the steps and the median validation loss over the runs; a run that ended early counts as infinite.

    >>> median_curve([{"steps": [0, 5], "validation_losses": [2.0, 1.0]}])
    ([0, 5], [2.0, 1.0])
    """
    steps = max((run["steps"] for run in runs), key=len)
    rows = np.full((len(runs), len(steps)), np.inf)
    for row, run in zip(rows, runs, strict=True):
        values = [math.inf if loss is None else loss for loss in run["validation_losses"]]
        row[: len(values)] = values
    with np.errstate(invalid="ignore"):
        median = np.median(rows, axis=0)
    # the mean of two infinities is none of NumPy's numbers
    return steps, np.where(np.isnan(median), np.inf, median).tolist()


def default_target(found: dict[str, dict[str, Any]]) -> float | None:
    """Give the largest of the rules' last validation losses, rounded up to three digits: all finite rules end there.

    >>> default_target({"a": {"curve": {"validation_losses": [0.1, 0.12341]}, "non_finite": 0}})
    0.124
    """
    last = [
        each["curve"]["validation_losses"][-1] for each in found.values() if not each["non_finite"]
    ]
    last = [loss for loss in last if loss is not None and loss > 0]
    if not last:
        return None
    unit = 10.0 ** (math.floor(math.log10(max(last))) - 2)
    return float(f"{math.ceil(max(last) / unit) * unit:.6g}")


def first_touch(curve: dict[str, Any], target: float) -> int | None:
    """Give the first evaluated step at which the loss is at most the target, or None.

    >>> first_touch({"steps": [0, 5, 10], "validation_losses": [2.0, 1.0, 1.5]}, 1.0)
    5
    """
    return next(
        (step for step, loss in _points(curve) if loss is not None and loss <= target),
        None,
    )


def settled_step(curve: dict[str, Any], target: float) -> int | None:
    """Give the first evaluated step from which on the loss stays at most the target, or None.

    >>> settled_step({"steps": [0, 5, 10, 15], "validation_losses": [2.0, 1.0, 1.5, 0.9]}, 1.0)
    15
    """
    settled = None
    for step, loss in reversed(_points(curve)):
        if loss is None or loss > target:
            break
        settled = step
    return settled


def _points(curve: dict[str, Any]) -> list[tuple[int, float | None]]:
    return list(zip(curve["steps"], curve["validation_losses"], strict=True))


def _reached(each: dict[str, Any], step: int | None, what: str) -> dict[str, float | str]:
    if step is None:
        return {f"steps_to_{what}": NOT_REACHED, f"seconds_to_{what}": NOT_REACHED}
    return {
        f"steps_to_{what}": step,
        f"seconds_to_{what}": step * each["seconds_per_step"],
    }


def _against(
    each: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, float | str | None]:
    """Compare with backprop; without it there is nothing to compare with."""
    if reference is None:
        return {"time_ratio": None, "T_ratio": None}
    best = reference["best_validation_loss"]
    touch = lambda rule: None if best is None else first_touch(rule["curve"], best)  # noqa: E731
    reached = _reached(each, touch(each), "backprops_best")
    own = _reached(reference, touch(reference), "backprops_best")
    ours, theirs = (
        reached["seconds_to_backprops_best"],
        own["seconds_to_backprops_best"],
    )
    ratio = (
        NOT_REACHED
        if isinstance(ours, str) or isinstance(theirs, str) or not theirs
        else ours / theirs
    )
    return {
        "time_ratio": each["seconds_per_step"] / reference["seconds_per_step"],
        **reached,
        "T_ratio": ratio,
    }


def _number(value: Any) -> float | None:
    """Give a finite number as JSON can hold it, else None."""
    return float(value) if math.isfinite(value) else None
