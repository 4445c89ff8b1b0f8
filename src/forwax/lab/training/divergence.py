"""What a run whose loss rises or does not fall says of it, and of its learning rate."""

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from forwax.lab.keeping.metrics import METRICS, rows_of

MANY = 10.0
"""How many times its first value a loss has where it counts as exploded."""


class Divergence:
    """Warns of a loss that explodes, once, and of one that ends where it began.

    Args:
        folder: the run's; another process than the one that writes it says nothing.
        advice: gives what to try; it is asked only where there is something to say.

    >>> divergence = Divergence(Path("nowhere"), lambda: "a smaller --learning-rate")
    >>> divergence.first = 2.3
    >>> print(divergence.end(2.5), end="")
    The test loss is 2.5, not below the 2.3 of the first batch: nothing was learnt; try a smaller
    --learning-rate.
    """

    def __init__(self, folder: Path, advice: Callable[[], str]):
        self.folder = folder
        self.advice = advice
        self.is_told = False

    @functools.cached_property
    def first(self) -> float | None:
        """The loss of the first batch, where its line of metrics.jsonl is sound."""
        with suppress(OSError), (self.folder / METRICS).open("rb") as file:
            for row in rows_of(file.readline()):
                return row.get("loss")
        return None

    def see(self, step: int, loss: float) -> None:
        """Warn on the standard error where the test loss after a step has exploded."""
        if self.is_told or not self.first or loss <= MANY * self.first:
            return
        self.is_told = True
        print(
            f"\nThe test loss after step {step} is {loss:.3g}, {loss / self.first:.3g} times the "
            f"loss of the first batch: try {self.advice()}.",
            file=sys.stderr,
        )

    def end(self, loss: float) -> str:
        """The line about a test loss at the end that is not below the first; else nothing."""
        if self.first is None or loss < self.first:
            return ""
        return (
            f"The test loss is {loss:.3g}, not below the {self.first:.3g} of the first batch: "
            f"nothing was learnt; try {self.advice()}.\n"
        )
