"""The folder of one run: config.json, metrics.jsonl, checkpoints, curves.png, summary.json.

A folder appears with config.json inside; every later file is written under another name and then
renamed. Only metrics.jsonl grows in its place, and is cut back to the checkpoint's step when a run
goes on. A kill at any moment leaves a folder that resumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import jax

from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import UsageError
from forwax.lab.keeping.checkpoints import Checkpoint, Checkpoints
from forwax.lab.report import Json, Rows, write_json, write_text
from forwax.lab.training.problem import Task
from forwax.lab.training.step import TrainState, init_state

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        path: the folder.
        config: what config.json holds.

    Example: `Run.open(Path("runs/digits-20250101-120000")).config["rule"]`
    """

    path: Path
    config: Json

    @classmethod
    def create(cls, parent: Path, name: str, config: Json) -> Run:
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
            return cls(path, json.loads((path / CONFIG).read_text()))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} is not the folder of a run: expected a folder with a readable {CONFIG}, "
                "such as runs/digits-20250101-120000."
            ) from error

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps and written its summary."""
        return (self.path / SUMMARY).exists()

    def summary(self) -> Json:
        """Read summary.json of a finished run."""
        return json.loads((self.path / SUMMARY).read_text())

    def metrics(self) -> Rows:
        """Read all complete lines of metrics.jsonl; empty where there is no such file."""
        rows = []
        with suppress(FileNotFoundError, ValueError):  # a line may be torn
            for line in (self.path / METRICS).read_bytes().split(b"\n")[:-1]:
                rows.append(json.loads(line))
        return rows

    def cut_metrics(self, step: int) -> None:
        """Cut metrics.jsonl back to the lines up to a step; a torn last line goes too.

        Args:
            step: the last step whose lines stay.
        """
        kept = takewhile(lambda row: row["step"] <= step, self.metrics())
        write_text(self.path / METRICS, _as_lines(kept))


def _move_to_free_name(draft: Path, name: str) -> Path:
    """Rename the draft; a name that is taken (two runs in one second) gets a number."""
    for number in range(1, 100):
        with suppress(OSError):
            return draft.rename(
                draft.with_name(name if number == 1 else f"{name}-{number}")
            )
    shutil.rmtree(draft, ignore_errors=True)
    raise FileExistsError(17, "a hundred runs began in the same second", name)


def _as_lines(rows: Iterable[Json]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Metrics:
    """Appends lines to metrics.jsonl.

    Example: `Metrics(run.path).append([{"step": 1, "loss": 2.3, "accuracy": 0.1, "seconds":
        0.01}])`
    """

    def __init__(self, folder: Path):
        self._file = (folder / METRICS).open("ab")

    def append(self, rows: Iterable[Json]) -> None:
        """Write one line a row and hand them to the system."""
        self._file.write(_as_lines(rows).encode())
        self._file.flush()

    def sync(self) -> None:
        """Wait until the lines are on the disk, as a checkpoint that counts on them demands."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(eq=False)
class Files:
    """What a sitting writes to, and where the last one stopped: at a state, or None, at a step."""

    run: Run
    metrics: Metrics
    checkpoints: Checkpoints
    state: TrainState | None
    step: int
    seconds: float


@contextmanager
def opened(run: Run, problem: Task, settings: Settings) -> Iterator[Files]:
    """Open a run's files, its metrics cut back to its last checkpoint."""
    like = jax.eval_shape(lambda: init_state(problem, settings))
    with closing(Checkpoints(run.path / CHECKPOINTS)) as checkpoints:
        found = checkpoints.restore(like) or Checkpoint(None, 0.0, {})
        step = int(found.state.step) if found.state else 0
        run.cut_metrics(step)
        with closing(Metrics(run.path)) as metrics:
            yield Files(run, metrics, checkpoints, found.state, step, found.seconds)
