"""The folder of one run: config.json, metrics.jsonl, checkpoints, curves.png, summary.json.

A folder appears with config.json inside; every later file is written under another name and then
renamed. Only metrics.jsonl grows in its place. A kill at any moment leaves a folder that resumes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from forwax.lab.flags import UsageError
from forwax.lab.keeping.disk import check_path
from forwax.lab.keeping.metrics import METRICS, rows_of
from forwax.lab.keeping.regular import read_object, read_plain
from forwax.lab.keeping.seal import is_sound, sealed, unsealed
from forwax.lab.keeping.stored import check_stored, refuse_changes
from forwax.lab.report import Json, Rows, write_json

CONFIG = "config.json"
SUMMARY = "summary.json"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Attributes:
        path: the folder.
        config: what config.json holds.
        is_sealed: whether config.json is what forwax wrote; None where it has no seal.

    Example: `Run.open(Path("runs/digits-20250101-120000")).config["rule"]`
    """

    path: Path
    config: Json
    is_sealed: bool | None = True

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
        check_path(parent)
        draft = parent / f".{name}-{os.getpid()}-{datetime.now():%H%M%S%f}.part"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            draft.mkdir()
            write_json(draft / CONFIG, sealed(config))
            return cls(
                _move_to_free_name(draft, f"{name}-{datetime.now():%Y%m%d-%H%M%S}"),
                config,
            )
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise UsageError(
                f"Cannot make a run's folder in {parent}: {error.strerror}; choose --runs."
            ) from error

    @classmethod
    def open(cls, path: Path, *kinds: Json | type) -> Run:
        """Open a run's folder.

        Args:
            path: the folder.
            *kinds: what config.json must hold, see `check_stored`.

        Raises:
            UsageError: when it is none, or config.json holds something else.
        """
        check_path(path)
        try:
            config = read_object(path / CONFIG)
        except OSError as error:
            raise UsageError(
                f"{path} is not the folder of a run: expected a folder with a readable {CONFIG}, "
                "such as runs/digits-20250101-120000."
            ) from error
        run = cls(path, unsealed(config), is_sound(config))
        for each in kinds:
            check_stored(path / CONFIG, each, run.config)
        return run

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps and written its summary."""
        return os.path.lexists(self.path / SUMMARY)

    def check_config(self, kept: Callable[[], Json]) -> None:
        """Refuse a config.json that is not the one of the last sitting.

        Args:
            kept: gives what the checkpoint keeps of it; empty where there is none.

        Raises:
            UsageError: naming what was changed, where that is known.
        """
        before = kept()
        if before:
            refuse_changes(self.path / CONFIG, before, self.config)
        if self.is_sealed is False:
            raise changed(self.path / CONFIG, "start a new run")

    def summary(self, *kinds: Json) -> Json:
        """Read summary.json of a finished run.

        Args:
            *kinds: what it must hold, see `check_stored`.

        Raises:
            UsageError: when it holds something else, or was changed.
        """
        path = self.path / SUMMARY
        value = read_object(path)
        for each in kinds:
            check_stored(path, each, value)
        if is_sound(value) is False:
            raise changed(path, "remove it, and the same command writes it again")
        return unsealed(value)

    def metrics(self) -> Rows:
        """Read all sound lines of metrics.jsonl; empty where there is no such file."""
        with suppress(FileNotFoundError):
            return rows_of(read_plain(self.path / METRICS))
        return []


def changed(path: Path, remedy: str) -> UsageError:
    """Give the error about a file that is not what forwax wrote."""
    return UsageError(
        f"{path} is not what forwax wrote: its content and its sum differ. Undo the change, or "
        f"{remedy}."
    )


def _move_to_free_name(draft: Path, name: str) -> Path:
    """Rename the draft; a name that is taken (two runs in one second) gets a number."""
    for number in range(1, 100):
        with suppress(OSError):
            return draft.rename(
                draft.with_name(name if number == 1 else f"{name}-{number}")
            )
    raise FileExistsError(17, "a hundred runs began in the same second", name)
