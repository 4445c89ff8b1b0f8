"""What a run whose loss rises or does not fall says of it, and of its learning rate."""

import sys
from collections.abc import Callable

import numpy as np

from forwax.lab.distributed.team import TEAM
from forwax.lab.report import Rows

MANY = 10.0
"""How many times its first value a loss has where it counts as exploded."""


class Divergence:
    """Warns of a loss that explodes, once, and of one that ends where it began.

    Args:
        advice: gives what to try; it is asked only where there is something to say.
        rows: of metrics.jsonl, so far.

    Attributes:
        first: the loss of the first batch; None until it is known.

    >>> divergence = Divergence(lambda: "a smaller --learning-rate", [{"step": 1, "loss": 2.3}])
    >>> divergence.end(2.5)
    'The test loss is 2.5, not below the 2.3 of the first batch: nothing was learnt; try a smaller
    --learning-rate.'
    """

    def __init__(self, advice: Callable[[], str], rows: Rows):
        self.advice = advice
        self.first: float | None = next((row.get("loss") for row in rows), None)
        self.is_told = False

    def begin(self, step: int, losses: np.ndarray) -> None:
        """Note the first loss, where a block of steps that ends at this one holds it."""
        if step == len(losses):
            self.first = float(losses[0])

    def see(self, step: int, loss: float) -> None:
        """Warn on the standard error where the test loss after a step has exploded."""
        if self.is_told or TEAM.index or not self.first or loss <= MANY * self.first:
            return
        self.is_told = True
        print(
            f"\nThe test loss after step {step} is {loss:.3g}, {loss / self.first:.3g} times the "
            f"loss of the first batch: try {self.advice()}.",
            file=sys.stderr,
        )

    def end(self, loss: float) -> str:
        """The sentence about a test loss at the end that is not below the first; else nothing."""
        if self.first is None or loss < self.first:
            return ""
        return (
            f"The test loss is {loss:.3g}, not below the {self.first:.3g} of the first batch: "
            f"nothing was learnt; try {self.advice()}."
        )
