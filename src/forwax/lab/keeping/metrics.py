"""metrics.jsonl: grows in its place, and is cut back to a checkpoint when a run goes on.

A checkpoint knows the length and the SHA-256 of the lines before it. So a torn end, which a kill
leaves, is told from damage.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from forwax.lab.flags import Natural, Range, UsageError
from forwax.lab.keeping.regular import free_name, open_plain, read_plain
from forwax.lab.keeping.stored import fault, warn
from forwax.lab.report import Json, Rows, replacing

METRICS = "metrics.jsonl"

SHARE = Annotated[float, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
_NUMBER = float | None
_KINDS: dict[str, Any] = {
    "step": Natural,
    "loss": _NUMBER,
    "accuracy": SHARE,
    "seconds": Annotated[_NUMBER, Range("zero or more", lambda x: not x < 0)],
    "test_loss": _NUMBER,
    "test_accuracy": SHARE,
    "test_error": _NUMBER,
    "epoch": _NUMBER,
    "begun": dict[str, Any],
}


def rows_of(content: bytes) -> Rows:
    r"""Read all sound lines; the last one is torn where it does not end.

    >>> rows_of(b'{"step": 1}\n[1]\n{"step": "a"}\n{"step": 2}\n{"st')
    [{'step': 1}, {'step': 2}]
    """
    return [row for _, row in _lines(content) if row]


def spans(steps: Iterable[int]) -> str:
    """Write steps in short.

    >>> spans({9, 1, 2, 3})
    '1-3, 9'
    """
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][-1] + 1:
            runs[-1][1:] = [step]
        else:
            runs.append([step])
    return ", ".join("-".join(map(str, run)) for run in runs)


class Metrics:
    """Appends lines to metrics.jsonl.

    Args:
        folder: the run's.
        doubtful: the steps whose lines damage may have changed, in short.

    Example: `Metrics(run.path).append([{"step": 1, "loss": 2.3, "accuracy": 0.1, "seconds":
        0.01}])`
    """

    def __init__(self, folder: Path, doubtful: str = ""):
        self._path = path = folder / METRICS
        # no buffer: what a full disk refuses must not be written once more on closing
        self._file = open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        content = read_plain(path)
        self._size = len(content)
        self._sum = hashlib.sha256(content)
        self.doubtful = doubtful

    def append(self, rows: Iterable[Json]) -> None:
        """Write one line a row and hand them to the system."""
        content = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
        while content:
            written = os.write(self._file, content)
            self._size += written
            self._sum.update(content[:written])
            content = content[written:]

    def sync(self) -> None:
        """Wait until the lines are on the disk, as a checkpoint that counts on them demands.

        Raises:
            FileNotFoundError: when the file is no longer there.
        """
        os.fsync(self._file)
        if not os.path.samestat(self._path.stat(), os.fstat(self._file)):
            raise FileNotFoundError(2, "it was replaced", str(self._path))

    def sums(self) -> Json:
        """Give what a checkpoint keeps of the lines so far."""
        return {
            "bytes": self._size,
            "sha256": self._sum.hexdigest(),
            "doubtful": self.doubtful,
        }

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def resumed(
    folder: Path, step: int, sums: Json | None, whole_every: int = 0
) -> Metrics:
    """Cut metrics.jsonl back to a checkpoint, and go on behind it.

    Where the lines before the checkpoint are not what was written, a warning says which steps are
    concerned, a copy is kept, and all sound lines stay.

    Args:
        folder: the run's.
        step: of the checkpoint; 0 where there is none.
        sums: what the checkpoint keeps of the lines; None where it is from before there were any.
        whole_every: how many steps lie between two lines, where no line may be missing; by default
            there is one for each step.

    Raises:
        UsageError: when lines are damaged and none may be; nothing is changed then.
    """
    path = folder / METRICS
    content = b""
    with suppress(FileNotFoundError):
        content = read_plain(path)
    if sums is not None and _is_sound(content, sums):
        if len(content) > sums["bytes"]:
            os.truncate(path, sums["bytes"])
        return Metrics(folder, sums["doubtful"])
    doubtful = sums["doubtful"] if sums else ""
    lines = list(_lines(content))
    missing = spans(_missing([row for _, row in lines], step, whole_every or 1))
    told = f"the lines of the steps {missing} are missing or unreadable"
    if not missing:
        told = f"a value of the steps 1-{step} is not what was written"
    if step and (missing or sums is not None):
        if whole_every:
            raise UsageError(
                f"{path} is damaged: {told}. Remove {folder}, and the same command trains it again."
            )
        doubtful = doubtful if missing else f"1-{step}"
        warn(f"{path} is damaged: {told}; {_back_up(path, content)}.")
    kept = b"".join(line for line, row in lines if row and row["step"] <= step)
    if kept != content:
        with replacing(path) as draft:
            draft.write_bytes(kept)
    return Metrics(folder, doubtful)


def _is_sound(content: bytes, sums: Json) -> bool:
    told = content[: sums["bytes"]]
    is_long = len(told) == sums["bytes"]
    return is_long and hashlib.sha256(told).hexdigest() == sums["sha256"]


def _lines(content: bytes) -> Iterator[tuple[bytes, Json | None]]:
    """All lines that end, each with its row, or None where it is no sound one."""
    for line in content.split(b"\n")[:-1]:
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        is_row = isinstance(row, dict) and "step" in row and not fault(_KINDS, row)
        yield line + b"\n", row if is_row else None


def _missing(rows: list[Json | None], last: int, every: int) -> set[int]:
    """The steps that have no line, and those next to a line that cannot be read."""
    seen = {row["step"] for row in rows if row}
    missing = {*range(every, last + 1, every), last} - {0, *seen}
    step = 0
    is_torn = False
    for row in [*rows, {"step": last + 1, "loss": None}]:
        if row is None:
            is_torn = True
            continue
        # where no step is missing, it told more of one that has another line
        if is_torn and step < row["step"] <= step + every and step <= last:
            missing.add(max(step, 1) if "loss" in row else row["step"])
        is_torn = False
        step = row["step"]
    return missing


def _back_up(path: Path, content: bytes) -> str:
    if not content:
        return "nothing of it is left"
    aside = free_name(path.with_name(f"{path.name}.damaged"))
    with replacing(aside) as draft:
        draft.write_bytes(content)
    return f"what it held is kept as {aside}"
