"""Checkpoints that vouch for themselves: Orbax writes them, with a sum of each array.

A checkpoint is a folder named by its step. It holds `state`, the arrays, and `sums`, their SHA-256
beside the settings and the length of the metrics that belong to it. One rename publishes both.
"""

from __future__ import annotations

import errno
import logging
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax.lab.flags import UsageError
from forwax.lab.keeping.regular import free_name
from forwax.lab.keeping.seal import (
    declared,
    is_sound,
    kind_of,
    leaf_sums,
    sealed,
)
from forwax.lab.keeping.stored import warn
from forwax.lab.report import Json

KEEP = 2
"""How many checkpoints stay; the one before the last is the way back from a damaged disk."""

STATE, SUMS, UNSUMMED = "state", "sums", "default"
"""The parts of a checkpoint, and the only part that versions before the sums wrote."""

PARTS = (STATE, SUMS, UNSUMMED, "_CHECKPOINT_METADATA", "commit_success.txt")
_OTHER = "is declared as {} and should be {}"
DRAFT = ".orbax-checkpoint-tmp"
DAMAGED = "damaged"


@dataclass(frozen=True)
class Checkpoint:
    """A state, None before the first one, and how many seconds of training led to it.

    `notes` is what was said at `Checkpoints.save`; empty where the checkpoint has no sums.
    """

    state: Any
    seconds: float
    notes: Json


class DamageError(Exception):
    """What is wrong with a checkpoint, in words that follow its name."""


class Checkpoints:
    """The checkpoints of one folder.

    Each is written under another name, then renamed, so that a kill leaves none torn. What forwax
    did not write into the folder is neither counted, read nor removed.

    Args:
        folder: where they are kept; it is made with the first one.

    Example: `Checkpoints(run.path / "checkpoints").save(state, seconds=1.5)`
    """

    def __init__(self, folder: Path):
        # imported here: it takes half a second that `forwax train --help` need not wait for
        import orbax.checkpoint as ocp

        self._folder = folder.absolute()
        self._args = ocp.args
        handlers: Any = {
            STATE: ocp.StandardCheckpointHandler(),
            SUMS: ocp.JsonCheckpointHandler(),
            UNSUMMED: ocp.StandardCheckpointHandler(),
        }
        self._writer = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))

    def latest_step(self) -> int | None:
        """Give the step of the newest complete checkpoint, or None."""
        return max(map(_step, self._own()), default=None)

    def save(self, state: Any, seconds: float, **notes: Any) -> None:
        """Write a checkpoint, complete on return; one of the same step stays as it is.

        Args:
            state: a named tuple of arrays, among them its `step`.
            seconds: the training time so far.
            **notes: what JSON can hold, to be given back with the state.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        tree = _as_tree(state, seconds)
        sums = sealed(
            {"kinds": declared(tree), "leaves": leaf_sums(tree), "notes": notes}
        )
        parts = {
            STATE: self._args.StandardSave(tree),
            SUMS: self._args.JsonSave(sums),
        }
        path = free_name(self._folder / str(step))
        try:
            self._writer.save(path, self._args.Composite(**parts))
        # a full disk is an OSError or a ValueError with the text of the library below
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise OSError(errno.EIO, reason, str(path)) from error
        for old in self._own()[:-KEEP]:
            _remove(old)

    def restore(self, like: Any) -> Checkpoint | None:
        """Read the newest sound checkpoint; damaged ones are named, and kept under another name.

        Args:
            like: a state with the right structure, shapes and dtypes.

        Returns:
            The checkpoint, or None where there is none.

        Raises:
            UsageError: when there are checkpoints and none is sound; nothing is changed then.
        """
        damaged: dict[Path, str] = {}
        found = None
        for path in reversed(self._own()):
            try:
                found = self._read(path, like)
                break
            # the readers of a damaged file raise whatever comes first
            except Exception as error:
                damaged[path] = _in_a_sentence(path, error)
        if damaged and found is None:
            raise UsageError(
                f"No checkpoint in {self._folder} is sound, and nothing there was changed. "
                f"{' '.join(damaged.values())} To train from the start, move that folder away."
            )
        for path, sentence in damaged.items():
            aside = path.rename(free_name(path.with_name(f"{path.name}.{DAMAGED}")))
            warn(f"{sentence} It is kept as {aside}; the one before it is used.")
        for path in self._folder.glob(f"*{DRAFT}*"):
            if re.match(r"[0-9]+(-[0-9]+)?\.", path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        return found

    def config(self) -> Json:
        """Give the newest `config` that is noted; empty where none can be read."""
        for path in reversed(self._own()):
            with suppress(Exception):
                return self._sums(path)["notes"]["config"]
        return {}

    def remove(self) -> None:
        """Remove all checkpoints, but not what else lies in their folder."""
        for path in self._own():
            _remove(path)
        with suppress(OSError):
            self._folder.rmdir()

    def close(self) -> None:
        """Free what Orbax holds."""
        self._writer.close()

    def _own(self) -> list[Path]:
        """The checkpoints that forwax wrote, the newest last."""
        found = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted((path for path in found if _is_own(path)), key=_place)

    def _sums(self, path: Path) -> Json:
        if not (path / SUMS).exists():
            raise DamageError("has no sums")
        item = {SUMS: self._args.JsonRestore()}
        sums = self._writer.restore(path, self._args.Composite(**item))[SUMS]
        if not is_sound(sums):
            raise DamageError("has sums that differ from their own")
        return sums

    def _read(self, path: Path, like: Any) -> Checkpoint:
        with _quiet():
            if not (path / STATE).exists() and (path / UNSUMMED).exists():
                tree = self._arrays(path, UNSUMMED, like)
                warn(
                    f"The checkpoint {path} is from a version that kept no sums: its content is "
                    f"taken as it is."
                )
                notes = {}
            else:
                sums = self._sums(path)
                _compare(sums["kinds"], declared(_as_tree(like, 0.0)), _OTHER)
                tree = self._arrays(path, STATE, like)
                _compare(leaf_sums(tree), sums["leaves"], "is not what was written")
                notes = sums["notes"]
        state = type(like)(**tree["state"])
        if int(state.step) != _step(path):
            raise DamageError(f"holds the state after step {int(state.step)}")
        return Checkpoint(state, float(tree["seconds"]), notes)

    def _arrays(self, path: Path, part: str, like: Any) -> Any:
        """Read the arrays, once what the files declare of them is what is expected.

        A damaged declaration of a huge chunk would end the process, not raise.
        """
        tree = _as_tree(like, 0.0)
        metadata: Any = self._writer.metadata(path).item_metadata
        told = metadata[part].tree
        leaves = jax.tree.leaves(told, is_leaf=lambda each: hasattr(each, "shape"))
        if Counter(map(kind_of, leaves)) != Counter(declared(tree).values()):
            raise DamageError(
                "declares arrays of other shapes or types than the run has"
            )
        for each in leaves:
            chunk = each.storage.chunk_shape or ()
            if math.prod(chunk) > max(1, math.prod(each.shape)):
                raise DamageError(
                    f"declares chunks of {chunk} of an array of {each.shape}"
                )
        item = {part: self._args.StandardRestore(tree)}
        return self._writer.restore(path, self._args.Composite(**item))[part]


def _as_tree(state: Any, seconds: float) -> Json:
    return {"state": state._asdict(), "seconds": np.float64(seconds)}


def _is_own(path: Path) -> bool:
    is_named = re.fullmatch("[0-9]+(-[0-9]+)?", path.name) is not None
    if not is_named or path.is_symlink():
        return False
    return any((path / part).exists() for part in PARTS)


def _place(path: Path) -> list[int]:
    return [int(number) for number in path.name.split("-")]


def _step(path: Path) -> int:
    return _place(path)[0]


def _remove(path: Path) -> None:
    """Remove a checkpoint, but not what else lies in its folder."""
    for part in PARTS:
        with suppress(OSError):
            (path / part).unlink() if (path / part).is_file() else shutil.rmtree(
                path / part
            )
    with suppress(OSError):
        path.rmdir()


def _compare(got: Json, wanted: Json, told: str) -> None:
    for name in sorted({*got, *wanted}):
        values = got.get(name), wanted.get(name)
        if values[0] != values[1]:
            raise DamageError(f"is damaged: {name} {told.format(*values)}")


def _in_a_sentence(path: Path, error: Exception) -> str:
    if isinstance(error, DamageError):
        return f"The checkpoint {path} {error}."
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"The checkpoint {path} cannot be read ({reason[:300].rstrip('.')})."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the readers of a damaged file say of it off the screen; the sentence says it.

    After a fault they stay quiet: those that it stopped half-way complain later, from threads.
    """
    hook = sys.unraisablehook

    def ignore(told: Any) -> None:
        code = getattr(told.object, "cr_code", None)
        is_reader = code is not None and "orbax" in code.co_filename
        if not is_reader and str(told.exc_value) != "Event loop is closed":
            hook(told)

    sys.unraisablehook = ignore
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    sys.unraisablehook = hook
