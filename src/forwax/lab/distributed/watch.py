"""A process that outlives the one that trains with others, and has the last word.

Where a process of a run is gone, jax ends the others by an abort, in which Python says no word. So
`forwax train --distributed` starts itself once more. The parent passes signals on, by a socket, and
turns an abort into a sentence and an exit code; the child ends when the parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from typing import Any

from forwax.lab.keeping.console import ERRORS, Patient

Facts = dict[str, Any]
"""What last words need of a process: count, index, resume."""

GONE = 4
"""The exit code where another process of the run is gone, or never came."""

VARIABLE = "FORWAX_LINK"
"""The environment variable that gives a child the number of its end of the socket."""

START_SECONDS = 300
"""How long processes wait for each other at the start: jax's own default."""

LINK: ParentLink | None = None
"""What ties this process to its parent, where it is a child."""

FACTS: Facts = {}
"""Those of this process."""


def tell(**facts: Any) -> None:
    """Note facts for the last words, and tell them a parent."""
    FACTS.update(facts)
    if LINK is not None:
        LINK.tell(facts)


class ParentLink:
    """A child's end: signals come from the parent alone, and its end ends the child."""

    def __init__(self, end: socket.socket):
        self._end = end
        self._number: int | None = None
        self._signals: Any = None
        self._is_joined = False
        threading.Thread(target=self._hear, daemon=True).start()

    def tell(self, facts: Facts) -> None:
        """Tell the parent facts; with the first of them this process has found the others."""
        self._is_joined = True
        self._end.sendall(json.dumps(facts).encode() + b"\n")

    def listen(self, signals: Any) -> None:
        """Set `signals.received` to what came, or comes; see `Signals`."""
        self._signals = signals
        signals.received = signals.received or self._number

    def _hear(self) -> None:
        # a parent that was killed resets the connection
        with suppress(ConnectionResetError):
            while told := self._end.recv(1):
                self._note(told[0])
        os._exit(GONE)

    def _note(self, number: int) -> None:
        # nobody to agree with yet: jax waits for the others, and no Python handler would run
        if not self._is_joined:
            os._exit(128 + number)
        self._number = number
        if self._signals is not None:
            self._signals.received = number


def supervised(words: Sequence[str], run: Callable[[], int]) -> int:
    """Run a command; in a child, where it trains with other processes that may die.

    Args:
        words: those after `forwax`.
        run: what runs them in this process.

    Returns:
        The exit code.
    """
    number = os.environ.pop(VARIABLE, None)
    if number is not None:
        return _as_child(socket.socket(fileno=int(number)), run)
    jax: Any = sys.modules.get("jax")
    is_initialized = jax is not None and jax.distributed.is_initialized()
    if words[0] != "train" or "--distributed" not in words or is_initialized:
        return run()
    return _as_parent([sys.executable, "-m", "forwax", *words])


def last_words(facts: Facts) -> str:
    """Say that a process is gone, and what goes on.

    >>> last_words({"count": 2, "index": 0, "resume": "runs/digits"})
    'process 1 of 2 is gone (killed, stopped or cut off), so process 0 ends too. Go on from the last
    checkpoint by starting all processes again with: forwax train --distributed --resume
    runs/digits'
    >>> last_words({})
    'not all processes came within 300 seconds. Start all of them again.'
    """
    if "count" not in facts:
        return (
            f"not all processes came within {START_SECONDS} seconds. Start all of them "
            "again."
        )
    count, index = facts["count"], facts["index"]
    # what is left of a team does not know which of the others it was
    who = f"process {1 - index} of 2"
    if count > 2:
        who = f"one of the {count - 1} other processes"
    again = "Start all processes again."
    if "resume" in facts:
        again = (
            "Go on from the last checkpoint by starting all processes again with: forwax train "
            f"--distributed --resume {facts['resume']}"
        )
    return (
        f"{who} is gone (killed, stopped or cut off), so process {index} ends too. "
        f"{again}"
    )


def _as_child(end: socket.socket, run: Callable[[], int]) -> int:
    global LINK
    LINK = ParentLink(end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # what libraries print below Python goes to the standard error: gloo tells of its peers
    out = os.dup(1)
    os.dup2(2, 1)
    stream: Any = Patient(
        open(out, "w", encoding=sys.stdout.encoding, errors=ERRORS, buffering=1)  # noqa: SIM115
    )
    with redirect_stdout(stream):
        code = run()
        stream.flush()
    return code


def _as_parent(command: Sequence[str]) -> int:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    environment = {**os.environ, VARIABLE: str(number)}
    # of its own session, so that a terminal's Ctrl-C comes to it once, by the socket
    child = subprocess.Popen(
        command, env=environment, pass_fds=[number], start_new_session=True
    )
    theirs.close()
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        with suppress(OSError):
            ours.send(bytes([number])) if len(received) == 1 else child.kill()

    with ours, ExitStack() as before:
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                before.callback(signal.signal, each, signal.signal(each, forward))
        code = child.wait()
        facts = _facts(ours)
    if code >= 0:
        return code
    if code == -signal.SIGABRT:
        print(f"forwax: {last_words(facts)}", file=sys.stderr, flush=True)
        return GONE
    if received:
        return 128 + received[0]
    print(f"forwax: it was ended by signal {-code}.", file=sys.stderr, flush=True)
    return 128 - code


def _facts(end: socket.socket) -> Facts:
    """All that a child told, which has ended."""
    facts: Facts = {}
    with end.makefile("rb") as lines, suppress(OSError):
        for line in lines:
            facts |= json.loads(line)
    return facts
