"""One line of a diagnosis: a way to a gradient, what it gives and what it costs."""

import dataclasses
import math

from forwax._reports.table import plus_minus, with_binary_prefix, with_prefix

COLUMNS = (
    "gradient",
    "predicted MSE",
    "measured MSE",
    "cosine",
    "arithmetic",
    "temporaries",
    "time",
    "× backprop",
)


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
        temporary_bytes: what the compiled program takes beside its arguments, temporaries + outputs
            - aliases, as the compiler counts.
        seconds: the median time of one call.
        unbiased: whether the mean of the estimate is the gradient.
        reverse_mode: whether the rule runs reverse mode; it is then never advised in place of
            backprop.
        error: why it does not run; None when it does.
        note: what the user did not ask for and should know; None where there is nothing.
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
    note: str | None = None

    @property
    def is_finite(self) -> bool:
        """Whether no draw was measured that is infinite or not a number."""
        return self.mse is None or math.isfinite(self.mse[0])

    @property
    def error_of_estimate(self) -> float | None:
        """The relative MSE: the law where there is one, else what was measured."""
        if self.predicted_mse is not None:
            return self.predicted_mse
        return None if self.mse is None else self.mse[0]

    @property
    def learning_rate_scale(self) -> float | None:
        """1 / (1 + M): what multiplies a rate tuned for the exact gradient; None if M is unknown.

        `forwax.suggest_learning_rate` gives the same from a law; here M may be measured.
        """
        error = self.error_of_estimate
        if error is None or not self.unbiased:
            return None
        return 1 / (1 + error)

    @property
    def seconds_of_progress(self) -> float | None:
        """The time for the progress of one exact step; None if biased or unknown."""
        error = self.error_of_estimate
        if self.seconds is None or error is None:
            return None
        if not self.unbiased or not math.isfinite(error):
            return None
        # Progress is <ĝ, g>² / E|ĝ|²: 1 + M steps of relative MSE M come as far as an exact one.
        return self.seconds * (1 + error)

    def cells(self, backprop: "DiagnosisRow") -> tuple[str, ...]:
        """The row as text."""
        if self.error is not None:
            unknown = [""] * (len(COLUMNS) - 2)
            return (self.name, *unknown, "does not run")
        law = self.predicted_mse
        memory = self.temporary_bytes
        seconds = self.seconds
        # No ratio where backprop does not run, or a clock is too coarse.
        ratio = seconds / backprop.seconds if seconds and backprop.seconds else None
        return (
            self.name,
            "no law" if law is None else f"{law:,.4g}",
            "no reference" if self.mse is None else plus_minus(*self.mse),
            "no reference" if self.cosine is None else plus_minus(*self.cosine),
            "-" if self.flops is None else with_prefix(self.flops, "FLOP"),
            "-" if memory is None else with_binary_prefix(memory),
            "-" if seconds is None else with_prefix(seconds, "s"),
            "-" if ratio is None else f"{ratio:.2f}",
        )
