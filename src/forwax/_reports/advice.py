"""Which gradient to use: one sentence that follows from the rows of a diagnosis alone."""

import math
from collections.abc import Sequence

from forwax._reports.diagnosis_row import DiagnosisRow
from forwax._reports.table import with_binary_prefix, with_prefix

LEAN = 4
"""How many times less memory than backprop's is worth a word."""

CHEAPER = 0.95
"""The share of a time that is less, and not merely another measurement."""


def advise(
    value: float,
    backprop: DiagnosisRow,
    checkpointed: DiagnosisRow,
    rules: Sequence[DiagnosisRow],
) -> str:
    """Say in one sentence which gradient to use.

    Rules are compared by the time that the progress of one exact step takes them, seconds × (1 + M)
    for an unbiased estimate of relative MSE M: its best learning rate is 1 / (1 + M) of the exact
    gradient's.
    """
    if not math.isfinite(value):
        return (
            f"The loss is {value} here, so no gradient can be judged: look for the cause, "
            'for example with jax.config.update("jax_debug_nans", True), or start from '
            "other parameters."
        )
    # A rule that runs reverse mode cannot stand in for backprop.
    running = [
        row
        for row in rules
        if row.error is None and row.is_finite and not row.reverse_mode
    ]
    known = [row for row in running if row.seconds_of_progress is not None]
    ranked = sorted(known, key=_progress)
    if backprop.error is not None:
        return _without_reverse_mode(running, ranked)
    timed = [row for row in running if row.seconds is not None]
    # The faster of both: recomputing may save time where memory is what limits.
    references = [row for row in (backprop, checkpointed) if row.seconds]
    if not timed or not references:
        is_finite = all(row.is_finite for row in rules)
        none = "no rule does" if is_finite else "no rule gives finite numbers"
        return f"Use backprop: reverse mode runs, and {none}."
    reference = min(references, key=_seconds)
    if ranked and _progress(ranked[0]) < CHEAPER * _seconds(reference):
        return _use_rule(ranked[0], reference)
    reason = _use_backprop(min(timed, key=_seconds), reference)
    return f"{reason}{_memory(backprop, checkpointed, running)}."


def _without_reverse_mode(
    running: Sequence[DiagnosisRow], ranked: Sequence[DiagnosisRow]
) -> str:
    if ranked:
        best = ranked[0]
        error = best.error_of_estimate or 0.0
        kind = (
            "its gradient is exact"
            if error == 0
            else f"its relative MSE is {error:,.3g}"
        )
        duration = with_prefix(_progress(best), "s")
        return (
            f"Backprop does not run here, so use {best.name}: {kind}, and of the rules that "
            f"run it takes the least time for the progress of one exact step, {duration}."
        )
    if running:
        quickest = min(running, key=_seconds)
        return (
            "Backprop does not run here, and without a law or a reference the rules cannot be "
            f"ranked: start with {quickest.name}, the quickest that runs."
        )
    return "Backprop does not run here and none of the rules runs: try forwax.FiniteDifference()."


def _use_rule(rule: DiagnosisRow, reference: DiagnosisRow) -> str:
    share = _progress(rule) / _seconds(reference)
    return (
        f"Use {rule.name}: for the progress of one exact step it takes {share:.2g} of "
        f"backprop's time, its relative MSE of {rule.error_of_estimate:,.3g} counted in."
    )


def _use_backprop(quickest: DiagnosisRow, reference: DiagnosisRow) -> str:
    share = _seconds(quickest) / _seconds(reference)
    error = quickest.error_of_estimate
    if share >= CHEAPER:
        return (
            "Use backprop: its gradient is exact, and no rule's step is cheaper "
            f"({quickest.name}: {share:.2f} of it)"
        )
    if error is None or not quickest.unbiased:
        return (
            f"Use backprop: its gradient is exact, though a step of {quickest.name} takes "
            f"{share:.2f} of its time"
        )
    return (
        f"Use backprop: a step of {quickest.name} takes {share:.2f} of its time, but with a "
        f"relative MSE of {error:,.3g} the progress of one exact step takes {1 + error:,.3g} "
        "of them"
    )


def _memory(
    backprop: DiagnosisRow, checkpointed: DiagnosisRow, running: Sequence[DiagnosisRow]
) -> str:
    """What is added where a rule needs far less memory than reverse mode; often nothing."""
    known = [row for row in running if row.temporary_bytes is not None]
    full, recomputed = backprop.temporary_bytes, checkpointed.temporary_bytes
    if not known or full is None or recomputed is None:
        return ""
    leanest = min(known, key=lambda row: row.temporary_bytes or 0)
    lean = leanest.temporary_bytes or 0
    # At least one byte: a program without temporaries is lean, but not infinitely so.
    if LEAN * max(lean, 1) > min(full, recomputed):
        return ""
    return (
        f"; only if its memory does not fit, {leanest.name} needs {with_binary_prefix(lean)} "
        f"against {with_binary_prefix(full)} "
        f"({with_binary_prefix(recomputed)} with jax.checkpoint)"
    )


def _seconds(row: DiagnosisRow) -> float:
    return math.inf if row.seconds is None else row.seconds


def _progress(row: DiagnosisRow) -> float:
    return math.inf if row.seconds_of_progress is None else row.seconds_of_progress
