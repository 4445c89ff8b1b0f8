"""What a disk refuses, in one sentence, with what goes on from there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forwax.lab.flags import UsageError

NOT_WRITTEN = 4
"""The exit code of a disk that is full, read-only or gone."""


class DiskError(OSError):
    """A file could not be written; the text is for the user."""


@contextmanager
def going_on(folder: Path, command: str) -> Iterator[None]:
    """Tell a disk's errors with the command that goes on.

    Args:
        folder: the run's, named where the error names no file.
        command: what goes on.

    Raises:
        DiskError: in place of any other `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{refused(error, folder)} What was finished before, the last checkpoint among it, is "
            f"kept; once there is room again, go on with: {command}"
        ) from error


def refused(error: OSError, path: Path | str = "A file") -> str:
    """Give a sentence about a file that cannot be read or written."""
    if isinstance(error, DiskError):
        return str(error)
    reason = error.strerror or str(error)
    return f"{error.filename or path} cannot be written: {reason}."


def check_path(path: Path) -> None:
    """Refuse a path that libraries, which take UTF-8, could not open here.

    Raises:
        UsageError: naming it.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The path {str(path)!a} cannot be used in this locale; choose another one, or "
            "set PYTHONUTF8=1."
        ) from error
