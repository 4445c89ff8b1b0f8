"""Checkpoints of a run, by Orbax: each is written under another name, then renamed, so that a kill leaves none torn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax.lab.training.program import TrainState

KEEP = 2
"""How many checkpoints stay; the one before the last is the way back from a damaged disk."""


@dataclass(frozen=True)
class Checkpoint:
    """A state and how many seconds of training led to it."""

    state: TrainState
    seconds: float


class Checkpoints:
    """The checkpoints of one folder.

    Args:
        folder: where they are kept; it is made with the first one.

    Example: `Checkpoints(run.path / "checkpoints").save(state, seconds=1.5)`
    """

    def __init__(self, folder: Path):
        # imported here: it takes half a second that `forwax train --help` need not wait for
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP, enable_async_checkpointing=False, create=True
        )
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Give the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, seconds: float) -> None:
        """Write a checkpoint and wait until it is complete; one of the same step stays as it is.

        Args:
            state: the state to keep.
            seconds: the training time so far.
        """
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=self._args.StandardSave(_as_tree(state, seconds)))
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> Checkpoint | None:
        """Read the newest complete checkpoint.

        Args:
            like: a state with the right structure, shapes and dtypes.

        Returns:
            The checkpoint, or None where there is none.
        """
        step = self.latest_step()
        if step is None:
            return None
        abstract = _abstract(_as_tree(like, 0.0))
        tree = self._manager.restore(step, args=self._args.StandardRestore(abstract))
        return Checkpoint(TrainState(**tree["state"]), float(tree["seconds"]))

    def close(self) -> None:
        """Free what Orbax holds."""
        self._manager.close()


def _as_tree(state: TrainState, seconds: float) -> dict[str, Any]:
    return {"state": state._asdict(), "seconds": np.float64(seconds)}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
