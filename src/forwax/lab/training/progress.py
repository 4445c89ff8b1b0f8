"""How far a run is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 3.0

Report = Callable[[int, float, float, float], None]
"""Is told the step reached, the training loss and accuracy of the last block, steps a second."""


@contextmanager
def bar(
    name: str, steps: int, start: int, console: Console | None = None
) -> Iterator[Report]:
    """Show a progress bar with loss, accuracy, steps per second and time left.

    Example: `with bar("digits", 1000, start=0) as report: report(10, 2.3, 0.1, 500.0)`
    """
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task(name, total=steps, completed=start, told="first steps")

        def report(step: int, loss: float, accuracy: float, pace: float) -> None:
            told = f"loss {loss:.4f}{_of(accuracy, ' ')} {pace:,.0f} steps/s"
            progress.update(task, completed=step, told=told)

        yield report


@contextmanager
def compiling() -> Iterator[None]:
    """Show on a terminal for how long something has been compiling; the line goes when it is done.

    Example: `with compiling(): program = jitted.lower(...).compile()`
    """
    if not sys.stdout.isatty():
        yield
        return
    with Progress(
        TextColumn("Compiling"), TimeElapsedColumn(), transient=True
    ) as progress:
        progress.add_task("", total=None)
        yield


def lines(name: str, steps: int, seconds_between: float) -> Report:
    """Print one plain line every few seconds and at the last step, without control codes, for logs.

    >>> report = lines("digits", 100, seconds_between=0.0)
    >>> report(50, 0.5, 0.75, 25.0)
    digits: step 50 of 100, loss 0.5000, accuracy 0.750, 25 steps/s, 0:00:02 left
    """
    last = time.monotonic()

    def report(step: int, loss: float, accuracy: float, pace: float) -> None:
        nonlocal last
        if step < steps and time.monotonic() - last < seconds_between:
            return
        last = time.monotonic()
        left = timedelta(seconds=round((steps - step) / max(pace, 1e-9)))
        shown = f"{pace:,.0f}" if pace >= 10 else f"{pace:.2g}"
        print(
            f"{name}: step {step} of {steps}, loss {loss:.4f}{_of(accuracy, ', ')}, "
            f"{shown} steps/s, {left} left",
            flush=True,
        )

    return report


def _of(accuracy: float, before: str) -> str:
    """The accuracy in words; nothing where the task has none, and it is not a number."""
    return f"{before}accuracy {accuracy:.3f}" if accuracy == accuracy else ""


def reporting(name: str, steps: int, start: int) -> AbstractContextManager[Report]:
    """Give a bar where the standard output is a terminal, else plain lines.

    Args:
        name: what is being trained.
        steps: the number of steps of the whole run.
        start: the step that the run goes on from.
    """
    if sys.stdout.isatty():
        return bar(name, steps, start)
    return nullcontext(lines(name, steps, SECONDS_BETWEEN_LINES))
