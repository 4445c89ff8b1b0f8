"""One writer at a time: a lock that the kernel drops when its holder dies."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from forwax.lab.flags import UsageError
from forwax.lab.keeping.regular import check_plain, read_plain
from forwax.lab.report import write_text

LOCK = ".lock"
HOLDER = ".lock-holder"
NAMES = (
    "config.json metrics.jsonl summary.json curves.png checkpoints parts results.json table.md "
    f"comparison.png {LOCK} {HOLDER}"
).split()
"""What commands write to a folder."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while the context lasts.

    Args:
        folder: which one process may write to.

    Raises:
        UsageError: when another process holds it, with that process's number, or where a link
            stands in place of a file.
    """
    lock = folder / LOCK
    holder = folder / HOLDER
    check_plain(folder / name for name in NAMES)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        number = "unknown"
        with suppress(OSError):
            number = read_plain(holder).decode(errors="replace")
        raise UsageError(
            f"{folder} is written to by another process, number {number}; wait until it ends, or "
            "stop it."
        ) from error
    try:
        # what a kill left behind: nobody else writes here now
        for draft in folder.glob(".*.part"):
            if re.fullmatch(r".+\.[0-9]+\.part", draft.name):
                draft.unlink(missing_ok=True)
        write_text(holder, str(os.getpid()))
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        with suppress(OSError):  # Windows keeps what is open
            lock.unlink()
        held.release()
