"""Ctrl-C and termination, noted so that a loop can stop between two blocks of steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from forwax.lab.distributed import watch

INTERRUPTED = 130
TERMINATED = 143
"""Exit codes: stopped by Ctrl-C, by a termination."""


class Signals:
    """Notes Ctrl-C and termination, so that a loop can stop between two blocks.

    A second one stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(
            number,
            signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler,
        )

    @property
    def code(self) -> int:
        """The exit code that tells which one came."""
        return TERMINATED if self.received == signal.SIGTERM else INTERRUPTED

    @contextlib.contextmanager
    def watch(self) -> Iterator[Signals]:
        """Watch while the context lasts; outside the main thread there is nothing to watch."""
        with contextlib.ExitStack() as before:
            if watch.LINK is not None:
                watch.LINK.listen(self)
            elif threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    handler = signal.signal(number, self._note)
                    before.callback(signal.signal, number, handler)
            yield self
