"""What a diagnosis found: a row for each way to a gradient, and one sentence of advice."""

import dataclasses
from typing import Any

from forwax._reports.advice import advise
from forwax._reports.diagnosis_row import COLUMNS, DiagnosisRow
from forwax._reports.table import as_rich, as_text

_NUMBERS = range(1, len(COLUMNS))


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
        >>> diagnose = fx.diagnose(lambda x: jnp.sum(x**2), [fx.WeightPerturbation()])
        >>> found = diagnose(jax.random.key(0), jnp.ones(5))
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
        return advise(self.value, self.backprop, self.checkpointed, self.rules)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text, the columns' names first."""
        name, _, _, _, *costs = self.loss.cells(self.backprop)
        # Without a gradient there is no error to speak of.
        without_gradient = (name, "", "", "", *costs)
        gradients = [row.cells(self.backprop) for row in self.rows[1:]]
        return [COLUMNS, without_gradient, *gradients]

    def notes(self) -> list[str]:
        """What the figures mean, why a row does not run, and what else there is to know."""
        against = "no exact gradient"
        if self.reference:
            against = f"the exact gradient by {self.reference}"
        figures = (
            f"{self.num_parameters:,} parameters; {self.draws} draws against {against}; "
            "times are medians."
        )
        reasons = [
            f"{row.name} does not run: {row.error}" for row in self.rows if row.error
        ]
        warnings = [row.note for row in self.rows if row.note]
        return [figures, *reasons, *warnings]

    def __str__(self) -> str:
        table = as_text(self.cells(), _NUMBERS)
        return "\n".join([table, "", *self.notes(), self.advice])

    def __rich__(self) -> Any:
        return as_rich(self.cells(), _NUMBERS, self.notes(), self.advice)
