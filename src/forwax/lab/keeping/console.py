"""Standard streams that may be closed, read by nobody, or without the signs that are printed."""

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNS = str.maketrans("×·…–—−→─━│┃╭╮╰╯├┤┌┐└┘", "x*.--->--||++++++++++")
ERRORS = "forwax.signs"
INTERRUPTED = 130


class Patient:
    """A stream that falls silent, and raises nothing, once its reader is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        try:
            self._stream.write(text)
        except OSError:
            self._fall_silent()
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what was not written yet."""
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        # what the stream still holds goes there too, also when Python flushes it at its end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Let every print succeed while the context lasts, whatever the standard streams are.

    What an encoding lacks is replaced, what nobody reads is dropped.
    """
    codecs.register_error(ERRORS, _replace)
    before = sys.stdout, sys.stderr
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name) or _nowhere(number)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)
        setattr(sys, name, Patient(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def as_process(main: Callable[[], int]) -> None:
    """End the process with the code that a function gives; at once where that tells of Ctrl-C.

    An interpreter that ends in good order while XLA compiles crashes; and a Ctrl-C that comes while
    the garbage is collected is lost, unless it ends the process there.
    """
    plain = sys.unraisablehook

    def notice(told: Any) -> None:
        if told.exc_type is KeyboardInterrupt:
            print("Stopped.", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        plain(told)

    sys.unraisablehook = notice
    code = main()
    if code == INTERRUPTED:
        os._exit(code)
    sys.exit(code)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end].translate(_SIGNS)
    return signs.encode("ascii", "replace").decode(), error.end


def _nowhere(number: int) -> Any:
    """A stream for a closed one; no other file may get its number, since libraries print there."""
    try:
        os.fstat(number)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return io.StringIO()
