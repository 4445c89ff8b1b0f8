"""How a long command is stopped: between two blocks of steps, with an exit code that says why."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

BLOCK_SECONDS = 0.25
"""How long a block of steps should take, so that Ctrl-C is answered within half a second."""

INTERRUPTED, TERMINATED, NOT_FINITE = 130, 143, 3
"""Exit codes: stopped by Ctrl-C, by a termination, by a loss that is not finite."""


def block_size(pace: float, last: int) -> int:
    """Give the steps of the next block: at most four times as many, since the first blocks measure the pace poorly.

    Args:
        pace: steps a second of the last block.
        last: the steps that the last block was meant to have.

    >>> block_size(1000.0, 16), block_size(1000.0, 200), block_size(0.1, 1)
    (64, 250, 1)
    """
    return max(1, min(int(BLOCK_SECONDS * pace), 4 * last))


class Signals:
    """Notes Ctrl-C and termination, so that the loop can stop between two blocks; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(
            number,
            signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler,
        )

    @contextlib.contextmanager
    def watch(self) -> Iterator[Signals]:
        """Watch while the context lasts; outside the main thread there is nothing to watch."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
