"""What a comparison found, as one dictionary for results.json; table and figure read nothing else.

All losses that are reached or not are validation losses, the median over the seeds. The target is
reached once the loss stays at or below it: a curve that touches it on its way up again has not
reached it. Seconds are steps times the median time of a step, measured in turns with the other
rules, so that what else the machine did meets all of them alike. The ratios are those of Baydin et
al. 2022: R is the time of a step over that of evaluating the loss once; T_f/T_b compares the times
to touch backprop's best validation loss.
"""

import math
import statistics
from decimal import ROUND_CEILING, Context
from itertools import compress, zip_longest

import numpy as np

from forwax._reports.timing import medians
from forwax.lab.catalogue.names import NamedRule
from forwax.lab.compare.lost import lost_runs
from forwax.lab.compare.rates import edge_note
from forwax.lab.report import Json, Rows, RowsByRule, finite
from forwax.lab.training.timing import LOSS

NOT_REACHED = "not reached"


def gather(
    rules: list[NamedRule],
    timing: Json,
    searches: RowsByRule,
    runs: RowsByRule,
    target_loss: float | None = None,
) -> Json:
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
    seconds = medians(timing["seconds"])
    found: dict[str, Json] = {}
    for rule in rules:
        name = rule.name
        found[name] = _of_runs(runs[name]) | {
            "about": rule.about,
            "colour": rule.colour,
            "dashes": rule.dashes,
            "search": searches.get(name, []),
            "edge": edge_note(searches[name]) if name in searches else None,
            "seconds_per_step": seconds[name],
            "R": seconds[name] / seconds[LOSS],
            "temporary_bytes": timing["temporary_bytes"][name],
        }
    target = default_target(found) if target_loss is None else target_loss
    for each in found.values():
        each |= _reached(each, settled_step(each["curve"], target), "target")
        each |= _against(each, found.get("backprop"))
    return {
        "loss_seconds": seconds[LOSS],
        "target_loss": target,
        "target_is": "the loss that the slowest rule that stayed finite ends at"
        if target_loss is None
        else "given",
        "rules": found,
    }


def _of_runs(runs: Rows) -> Json:
    """Gather what the seeds of one rule gave."""
    accuracies = [run["test_accuracy"] for run in runs]
    steps, losses = median_curve(runs)
    # None becomes nan, and the mean of it None again
    train_loss = np.mean(np.array([run["train_loss"] for run in runs], float))
    return {
        "learning_rate": runs[0]["learning_rate"],
        "train_loss": finite(train_loss),
        "test_accuracy": float(np.mean(accuracies)),
        "test_accuracy_sd": float(np.std(accuracies, ddof=1))
        if len(runs) > 1
        else None,
        **lost_runs(runs),
        "best_validation_loss": finite(min(losses, default=math.inf)),
        "curve": {
            "steps": steps,
            "validation_losses": [finite(loss) for loss in losses],
        },
        "runs": runs,
    }


def median_curve(runs: Rows) -> tuple[list[int], list[float]]:
    """Give the steps and the median validation loss over the runs.

    A run that ended early counts as infinite.

    >>> median_curve([{"steps": [0, 5], "validation_losses": [2.0, 1.0]}])
    ([0, 5], [2.0, 1.0])
    """
    steps = max((run["steps"] for run in runs), key=len)
    losses = zip_longest(*(run["validation_losses"] for run in runs))
    by_step = (
        [math.inf if loss is None else loss for loss in of_runs] for of_runs in losses
    )
    # NumPy's median of infinities is not a number
    return steps, list(map(statistics.median, by_step))


def default_target(found: dict[str, Json]) -> float | None:
    """Give the largest of the rules' last validation losses, rounded up to three digits.

    All finite rules end there or below.

    >>> default_target({"a": {"curve": {"validation_losses": [0.1, 0.12341]}, "non_finite": 0}})
    0.124
    """
    ends = [
        each["curve"]["validation_losses"][-1] or 0
        for each in found.values()
        if not each["non_finite"]
    ]
    largest = max(ends, default=0)
    if largest <= 0:
        return None
    digits = Context(prec=3, rounding=ROUND_CEILING)
    return float(digits.create_decimal(str(largest)))


def first_touch(curve: Json, target: float | None) -> int | None:
    """Give the first evaluated step at which the loss is at most the target, if any, or None.

    >>> first_touch({"steps": [0, 5, 10], "validation_losses": [2.0, 1.0, 1.5]}, 1.0)
    5
    """
    return next(compress(curve["steps"], _is_low(curve, target)), None)


def settled_step(curve: Json, target: float | None) -> int | None:
    """Give the first evaluated step from which on the loss stays at most the target, or None.

    >>> settled_step({"steps": [0, 5, 10, 15], "validation_losses": [2.0, 1.0, 1.5, 0.9]}, 1.0)
    15
    """
    # low there, and at all later steps
    stays_low = np.logical_and.accumulate(_is_low(curve, target)[::-1])[::-1]
    return next(compress(curve["steps"], stays_low), None)


def _is_low(curve: Json, target: float | None) -> np.ndarray:
    """Say of each step whether the loss is at most the target; a missing one is not."""
    # None becomes nan, which is neither at most a target nor reached
    losses = np.array(curve["validation_losses"], float)
    return losses <= np.array(target, float)


def _reached(each: Json, step: int | None, what: str) -> dict[str, float | str]:
    seconds = NOT_REACHED if step is None else step * each["seconds_per_step"]
    return {
        f"steps_to_{what}": NOT_REACHED if step is None else step,
        f"seconds_to_{what}": seconds,
    }


def _against(each: Json, reference: Json | None) -> Json:
    """Compare with backprop; without it there is nothing to compare with."""
    if reference is None:
        return {"time_ratio": None, "T_ratio": None}
    best = reference["best_validation_loss"]
    ours, theirs = (first_touch(rule["curve"], best) for rule in (each, reference))
    time_ratio = each["seconds_per_step"] / reference["seconds_per_step"]
    return {
        "time_ratio": time_ratio,
        **_reached(each, ours, "backprops_best"),
        # a reference that was at its best before the first step took no time
        "T_ratio": time_ratio * ours / theirs
        if ours is not None and theirs
        else NOT_REACHED,
    }
