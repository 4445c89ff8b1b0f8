"""The folder of one run: config.json, metrics.jsonl, checkpoints, curves.png, summary.json.

A folder appears with config.json inside; every later file is written under another name and then
renamed, or, as metrics.jsonl, cut back to the checkpoint's step when a run goes on. A kill at any
moment leaves a folder that resumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from forwax.lab.settings import UsageError

CONFIG, METRICS, SUMMARY, CURVES, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "checkpoints",
)


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        path: the folder.
        config: what config.json holds.

    Example: `Run.open(Path("runs/digits-20250101-120000")).config["rule"]`
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def create(cls, parent: Path, name: str, config: dict[str, Any]) -> Run:
        """Make the folder `<parent>/<name>-<time>` in one move, with config.json inside.

        Args:
            parent: the folder of all runs; it is made where it is missing.
            name: what the folder's name begins with.
            config: what config.json will hold.

        Raises:
            UsageError: when the parent cannot be written to.
        """
        try:
            parent.mkdir(parents=True, exist_ok=True)
            draft = parent / f".{name}-{os.getpid()}-{datetime.now():%H%M%S%f}.part"
            draft.mkdir()
            write_json(draft / CONFIG, config)
            return cls(
                _move_to_free_name(draft, f"{name}-{datetime.now():%Y%m%d-%H%M%S}"),
                config,
            )
        except OSError as error:
            raise UsageError(
                f"Cannot make a run's folder in {parent}: {error.strerror}; choose --runs."
            ) from error

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a run's folder.

        Args:
            path: the folder.

        Raises:
            UsageError: when it is none.
        """
        try:
            config = json.loads((path / CONFIG).read_text())
        except (OSError, ValueError) as error:
            wanted = (
                f"expected a folder with a readable {CONFIG}, such as runs/digits-20250101-120000"
            )
            raise UsageError(f"{path} is not the folder of a run: {wanted}.") from error
        return cls(path, config)

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps and written its summary."""
        return (self.path / SUMMARY).exists()

    def summary(self) -> dict[str, Any]:
        """Read summary.json of a finished run."""
        return json.loads((self.path / SUMMARY).read_text())

    def metrics(self) -> list[dict[str, Any]]:
        """Read all complete lines of metrics.jsonl; empty where there is no such file."""
        path = self.path / METRICS
        return [row for row, _ in _complete_rows(path.read_bytes())] if path.exists() else []

    def cut_metrics(self, step: int) -> None:
        """Cut metrics.jsonl back to the lines up to a step; a torn last line goes too.

        Args:
            step: the last step whose lines stay.
        """
        path = self.path / METRICS
        if not path.exists():
            return
        end = 0
        for row, stop in _complete_rows(path.read_bytes()):
            if row["step"] > step:
                break
            end = stop
        os.truncate(path, end)


class Metrics:
    """Appends lines to metrics.jsonl.

    Example: `Metrics(run.path).append([{"step": 1, "loss": 2.3, "accuracy": 0.1, "seconds":
        0.01}])`
    """

    def __init__(self, folder: Path):
        self._file = (folder / METRICS).open("ab")

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write one line a row and hand them to the system."""
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines are on the disk, as a checkpoint that counts on them demands."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in one move.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"a": 1})
    >>> json.loads(path.read_text())
    {'a': 1}
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one move, so that a reader never sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _move_to_free_name(draft: Path, name: str) -> Path:
    """Rename the draft; a name that is taken (two runs in one second) gets a number."""
    for number in range(1, 100):
        path = draft.with_name(name if number == 1 else f"{name}-{number}")
        if not path.exists():
            try:
                os.rename(draft, path)
                return path
            except OSError:
                continue
    shutil.rmtree(draft, ignore_errors=True)
    raise FileExistsError(17, "a hundred runs began in the same second", name)


def _complete_rows(content: bytes) -> Iterable[tuple[dict[str, Any], int]]:
    """Give each row with the offset of its end, up to the first line that is torn."""
    end = 0
    for line in content.split(b"\n")[:-1]:
        end += len(line) + 1
        try:
            row = json.loads(line)
        except ValueError:
            return
        yield row, end
