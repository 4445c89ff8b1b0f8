"""How far a run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 3.0


class Reporter(AbstractContextManager["Reporter"], Protocol):
    """What a session tells about its progress."""

    def __exit__(self, *exception: object) -> None:
        """Leave what is shown as it is."""

    def update(
        self, step: int, loss: float, accuracy: float, steps_per_second: float
    ) -> None:
        """Tell the step reached, the training loss and accuracy of the last block, and the pace."""
        ...


class Bar(Reporter):
    """A progress bar with loss, accuracy, steps per second and time left.

    Example: `with Bar("digits", 1000, start=0) as report: report.update(10, 2.3, 0.1, 500.0)`
    """

    def __init__(
        self, name: str, steps: int, start: int, console: Console | None = None
    ):
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(
            name, total=steps, completed=start, told="first steps"
        )

    def __enter__(self) -> Bar:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def update(
        self, step: int, loss: float, accuracy: float, steps_per_second: float
    ) -> None:
        """Redraw the bar."""
        told = (
            f"loss {loss:.4f} accuracy {accuracy:.3f} {steps_per_second:,.0f} steps/s"
        )
        self._progress.update(self._task, completed=step, told=told)


class Lines(Reporter):
    """One plain line every few seconds, without control codes, for logs.

    >>> with Lines("digits", 100, seconds_between=0.0) as report:
    ...     report.update(50, 0.5, 0.75, 25.0)
    digits: step 50 of 100, loss 0.5000, accuracy 0.750, 25 steps/s, 0:00:02 left
    """

    def __init__(self, name: str, steps: int, seconds_between: float):
        self._name = name
        self._steps = steps
        self._seconds_between = seconds_between
        self._last = time.monotonic()

    def update(
        self, step: int, loss: float, accuracy: float, steps_per_second: float
    ) -> None:
        """Print a line where the last one is old enough, and at the last step."""
        if step < self._steps and time.monotonic() - self._last < self._seconds_between:
            return
        self._last = time.monotonic()
        left = timedelta(
            seconds=round((self._steps - step) / max(steps_per_second, 1e-9))
        )
        pace = (
            f"{steps_per_second:,.0f}"
            if steps_per_second >= 10
            else f"{steps_per_second:.2g}"
        )
        print(
            f"{self._name}: step {step} of {self._steps}, loss {loss:.4f}, accuracy "
            f"{accuracy:.3f}, {pace} steps/s, {left} left",
            flush=True,
        )


def make_reporter(name: str, steps: int, start: int) -> Reporter:
    """Give a bar where the standard output is a terminal, else plain lines.

    Args:
        name: what is being trained.
        steps: the number of steps of the whole run.
        start: the step that the run goes on from.
    """
    if sys.stdout.isatty():
        return Bar(name, steps, start)
    return Lines(name, steps, SECONDS_BETWEEN_LINES)
