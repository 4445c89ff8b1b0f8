"""What a diagnosis found: a row for each way to a gradient, and one sentence of advice that follows from the rows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

_COLUMNS = (
    "gradient",
    "predicted MSE",
    "measured MSE",
    "cosine",
    "arithmetic",
    "temporaries",
    "time",
    "× backprop",
)
_NUMBERS = range(1, len(_COLUMNS))
LEAN = 4
"""How many times less memory than backprop's is worth a word."""


@dataclasses.dataclass(frozen=True)
class DiagnosisRow:
    """One way to a gradient, or the loss alone.

    Attributes:
        name: what it is.
        predicted_mse: the law of E|ĝ - g|² / |g|²; None where there is none.
        mse: the mean of |ĝ - g|² / |g|² over the draws, and its standard error; None without a
            reference.
        cosine: the mean cosine of ĝ and g, and its standard error; None without a reference.
        flops: the arithmetic operations of the compiled program, as XLA counts them; a loop's body
            counts once.
        temporary_bytes: what the compiled program needs beside its arguments and results.
        seconds: the median time of one call.
        unbiased: whether the mean of the estimate is the gradient.
        reverse_mode: whether the rule runs reverse mode; it is then never advised in place of
            backprop.
        error: why it does not run; None when it does.
    """

    name: str
    predicted_mse: float | None = None
    mse: tuple[float, float] | None = None
    cosine: tuple[float, float] | None = None
    flops: float | None = None
    temporary_bytes: int | None = None
    seconds: float | None = None
    unbiased: bool = True
    reverse_mode: bool = False
    error: str | None = None

    @property
    def error_of_estimate(self) -> float | None:
        """The relative MSE: the law where there is one, else what was measured."""
        if self.predicted_mse is not None:
            return self.predicted_mse
        return None if self.mse is None else self.mse[0]

    @property
    def seconds_of_progress(self) -> float | None:
        """The time for the progress of one exact step: 1 + M steps of relative MSE M; None if biased or unknown."""
        error = self.error_of_estimate
        if self.seconds is None or error is None or not self.unbiased or not math.isfinite(error):
            return None
        return self.seconds * (1 + error)

    def cells(self, backprop: "DiagnosisRow") -> tuple[str, ...]:
        """The row as text."""
        if self.error is not None:
            return (self.name, *[""] * (len(_COLUMNS) - 2), "does not run")
        ratio = self.seconds / backprop.seconds if self.seconds and backprop.seconds else None
        return (
            self.name,
            "no law" if self.predicted_mse is None else f"{self.predicted_mse:,.4g}",
            "no reference" if self.mse is None else _plus_minus(*self.mse),
            "no reference" if self.cosine is None else _plus_minus(*self.cosine),
            "-" if self.flops is None else with_prefix(self.flops, "FLOP"),
            "-" if self.temporary_bytes is None else with_binary_prefix(self.temporary_bytes),
            "-" if self.seconds is None else with_prefix(self.seconds, "s"),
            "-" if ratio is None else f"{ratio:.2f}",
        )


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A table and one sentence of advice; print it. `rich.print` shows it as a rich table.

    Attributes:
        loss: the loss alone, no gradient.
        backprop: `jax.value_and_grad`.
        checkpointed: the same with `jax.checkpoint` around the loss.
        rules: each rule, in the order given.
        num_parameters: the number n of real coordinates.
        value: the loss.
        reference: where the exact gradient came from; None when there was none.
        draws: how many estimates of each rule were compared with it.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> found = fx.diagnose(lambda x: jnp.sum(x**2), [fx.WeightPerturbation()])(jax.random.key(0), jnp.ones(5))
        >>> found.num_parameters, found.rules[0].predicted_mse
        (5, 4.0)
    """

    loss: DiagnosisRow
    backprop: DiagnosisRow
    checkpointed: DiagnosisRow
    rules: tuple[DiagnosisRow, ...]
    num_parameters: int
    value: float
    reference: str | None
    draws: int

    @property
    def rows(self) -> tuple[DiagnosisRow, ...]:
        """All rows of the table."""
        return (self.loss, self.backprop, self.checkpointed, *self.rules)

    @property
    def advice(self) -> str:
        """One sentence, from the rows alone."""
        return advise(self)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, the columns' names first."""
        loss = self.loss.cells(self.backprop)
        return [
            _COLUMNS,
            (loss[0], "", "", "", *loss[4:]),
            *(row.cells(self.backprop) for row in self.rows[1:]),
        ]

    def notes(self) -> list[str]:
        """What the figures mean, and why a row does not run."""
        against = (
            f"the exact gradient by {self.reference}" if self.reference else "no exact gradient"
        )
        first = (
            f"{self.num_parameters:,} parameters; {self.draws} draws against {against}; "
            f"times "
            f"are medians."
        )
        return [
            first,
            *(f"{row.name} does not run: {row.error}" for row in self.rows if row.error),
        ]

    def __str__(self) -> str:
        table = self.cells()
        widths = [max(len(cells[i]) for cells in table) for i in range(len(_COLUMNS))]
        lines = [_line(cells, widths) for cells in table]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([lines[0], rule, *lines[1:], "", *self.notes(), self.advice])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        header, *rows = self.cells()
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i in _NUMBERS else "left")
        for cells in rows:
            table.add_row(*map(Text, cells))
        return Group(table, *map(Text, self.notes()), Text(self.advice, style="bold"))


def advise(found: Diagnosis) -> str:
    """Say in one sentence which gradient to use.

    Rules are compared by the time that the progress of one exact step takes them, seconds × (1 + M)
    for an unbiased estimate of relative MSE M: its best learning rate is 1 / (1 + M) of the exact
    gradient's.
    """
    if not math.isfinite(found.value):
        return (
            f"The loss is {found.value} here, so no gradient can be judged: look for the cause, "
            f"for example with "
            'jax.config.update("jax_debug_nans", True), or start from other parameters.'
        )
    running = [row for row in found.rules if row.error is None and not row.reverse_mode]
    ranked = sorted((row for row in running if row.seconds_of_progress is not None), key=_progress)
    if found.backprop.error is not None:
        return _without_reverse_mode(running, ranked)
    quickest = min((row for row in running if row.seconds is not None), key=_seconds, default=None)
    reference = min(
        (row for row in (found.backprop, found.checkpointed) if row.seconds),
        key=_seconds,
        default=None,
    )
    if quickest is None or reference is None:
        return "Use backprop: reverse mode runs, and no rule does."
    if ranked and _progress(ranked[0]) < 0.95 * _seconds(reference):
        share = _progress(ranked[0]) / _seconds(reference)
        return (
            f"Use {ranked[0].name}: for the progress of one exact step it takes {share:.2g} of "
            f"backprop's time, its "
            f"relative MSE of {ranked[0].error_of_estimate:,.3g} counted in."
        )
    return _use_backprop(quickest, reference) + _memory(found, running) + "."


def _without_reverse_mode(running: Sequence[DiagnosisRow], ranked: Sequence[DiagnosisRow]) -> str:
    if ranked:
        error = ranked[0].error_of_estimate or 0.0
        kind = "its gradient is exact" if error == 0 else f"its relative MSE is {error:,.3g}"
        return (
            f"Backprop does not run here, so use {ranked[0].name}: {kind}, and of the rules that "
            f"run it takes the "
            f"least time for the progress of one exact step, "
            f"{with_prefix(_progress(ranked[0]), 's')}."
        )
    if running:
        return (
            f"Backprop does not run here, and without a law or a reference the rules cannot be "
            f"ranked: start with "
            f"{min(running, key=_seconds).name}, the quickest that runs."
        )
    return "Backprop does not run here and none of the rules runs: try forwax.FiniteDifference()."


def _use_backprop(quickest: DiagnosisRow, reference: DiagnosisRow) -> str:
    share, error = _seconds(quickest) / _seconds(reference), quickest.error_of_estimate
    if share >= 0.95:
        return (
            f"Use backprop: its gradient is exact, and no rule's step is "
            f"cheaper "
            f"({quickest.name}: {share:.2f} of it)"
        )
    if error is None or not quickest.unbiased:
        return (
            f"Use backprop: its gradient is exact, though a step of {quickest.name} "
            f"takes "
            f"{share:.2f} of its time"
        )
    return (
        f"Use backprop: a step of {quickest.name} takes {share:.2f} of its time, but with a "
        f"relative MSE of "
        f"{error:,.3g} the progress of one exact step takes {1 + error:,.3g} of them"
    )


def _memory(found: Diagnosis, running: Sequence[DiagnosisRow]) -> str:
    known = [row for row in running if row.temporary_bytes is not None]
    both = [found.backprop.temporary_bytes, found.checkpointed.temporary_bytes]
    if not known or None in both:
        return ""
    leanest = min(known, key=lambda row: row.temporary_bytes or 0)
    if LEAN * max(leanest.temporary_bytes or 0, 1) > min(x for x in both if x is not None):
        return ""
    lean, full, kept = map(with_binary_prefix, (leanest.temporary_bytes, *both))  # type: ignore[arg-type]
    return (
        f"; only if its memory does not fit, {leanest.name} needs {lean} against {full} "
        f"({kept} "
        f"with jax.checkpoint)"
    )


def _seconds(row: DiagnosisRow) -> float:
    return math.inf if row.seconds is None else row.seconds


def _progress(row: DiagnosisRow) -> float:
    return math.inf if row.seconds_of_progress is None else row.seconds_of_progress


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    padded = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
    return "  ".join([first.ljust(widths[0]), *padded]).rstrip()


def _plus_minus(mean: float, error: float) -> str:
    return f"{mean:,.3g}" if error == 0 else f"{mean:,.3g} ± {error:,.1g}"


def with_prefix(number: float, unit: str) -> str:
    """A number with three digits and an SI prefix.

    >>> with_prefix(1.5e9, "FLOP"), with_prefix(2.5e-3, "s"), with_prefix(0, "s")
    ('1.5 GFLOP', '2.5 ms', '0 s')
    """
    power = 0 if number == 0 else math.floor(math.log10(abs(number)) / 3)
    power = min(max(power, -3), 5)
    return (
        f"{number / 1000**power:.3g} "
        f"{['n', 'µ', 'm', '', 'k', 'M', 'G', 'T', 'P'][power + 3]}{unit}"
    )


def with_binary_prefix(count: int) -> str:
    """A number of bytes.

    >>> with_binary_prefix(3 * 2**20), with_binary_prefix(20)
    ('3 MiB', '20 B')
    """
    power = 0 if count == 0 else min(int(math.log2(count) / 10), 4)
    return f"{count / 1024**power:.4g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"
