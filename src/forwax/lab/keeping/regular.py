"""A run's files are plain files of its own: never what a link, a fifo or a device leads to."""

import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from forwax.lab.flags import UsageError
from forwax.lab.report import Json

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# absent on Windows, where the check before the opening has to do
_WITHOUT_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def check_plain(paths: Iterable[Path]) -> None:
    """Refuse what is neither a folder nor a plain file with one name; what is missing is fine.

    Raises:
        UsageError: naming the path and what it is.
    """
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            _check(path, path.lstat())


def open_plain(path: Path, flags: int) -> int:
    """Open a plain file with one name, without following a link or waiting for another process.

    Args:
        path: the file.
        flags: those of `os.open`.

    Returns:
        A descriptor.

    Raises:
        UsageError: when it is something else.
        OSError: when it cannot be opened.
    """
    check_plain([path])
    descriptor = os.open(path, flags | _WITHOUT_LINKS | _BINARY, 0o666)
    try:
        _check(path, os.fstat(descriptor))
    except UsageError:
        os.close(descriptor)
        raise
    return descriptor


def read_plain(path: Path) -> bytes:
    """Read a plain file; see `open_plain`."""
    with open(open_plain(path, os.O_RDONLY), "rb") as file:
        return file.read()


def read_object(path: Path) -> Json:
    """Read a file that holds one JSON object; see `open_plain`.

    Raises:
        UsageError: when it holds something else.
    """
    try:
        value: Any = json.loads(read_plain(path))
    except (ValueError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, RecursionError) else error
        raise UsageError(f"{path} is damaged: it is no JSON ({reason}).") from error
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} is damaged: expected a JSON object, got {type(value).__name__}."
        )
    return value


def free_name(path: Path) -> Path:
    """Give a path that nothing has yet: `a`, else `a-2`."""
    name = path.name
    number = 2
    while os.path.lexists(path):
        path = path.with_name(f"{name}-{number}")
        number += 1
    return path


def _check(path: Path, found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    what = _KINDS.get(kind)
    if kind == stat.S_IFREG and found.st_nlink > 1:
        what = "one of several names (hard links) of one file"
    if what is not None:
        raise UsageError(
            f"{path} is {what}, and forwax reads and writes only what is the run's own; put a "
            "copy in its place."
        )
