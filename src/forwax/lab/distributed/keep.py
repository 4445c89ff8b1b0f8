"""A run's files, which one process writes, and the check at each save that all have the same."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from forwax.lab.distributed import watch
from forwax.lab.distributed.team import (
    TEAM,
    from_first,
    gathered,
    process,
    shared,
    together,
)
from forwax.lab.flags import UsageError
from forwax.lab.keeping.checkpoints import (
    STATE,
    SUMS,
    UNSUMMED,
    Checkpoint,
    Checkpoints,
)
from forwax.lab.keeping.folder import Run
from forwax.lab.keeping.metrics import Metrics
from forwax.lab.keeping.seal import leaf_sums
from forwax.lab.report import Json

Opened = tuple[Metrics, Checkpoints, Checkpoint]
"""The files of a sitting, and where the last one stopped."""


class UnequalError(Exception):
    """Processes that should have the same parameters have not."""


class FirstCheckpoints(Checkpoints):
    """Checkpoints that one process of several writes, from copies in its own memory."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        alone: Any = {
            "multiprocessing_options": ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="forwax"
            )
        }
        handlers: Any = {
            STATE: ocp.StandardCheckpointHandler(**alone),
            SUMS: ocp.JsonCheckpointHandler(**alone),
            UNSUMMED: ocp.StandardCheckpointHandler(**alone),
        }
        options = ocp.CompositeOptions(**alone)
        self._folder = folder.absolute()
        self._args = ocp.args
        handler = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
        self._writer = ocp.Checkpointer(handler, **alone)

    def save(self, state: Any, seconds: float, **notes: Any) -> None:
        """Write a checkpoint, once all processes are known to have the same state."""
        check_equal(state)
        with together():
            super().save(jax.device_get(state), seconds, **notes)


class OthersCheckpoints(Checkpoints):
    """What takes the place of checkpoints in a process that writes none."""

    def __init__(self) -> None:
        pass

    def save(self, state: Any, seconds: float, **notes: Any) -> None:
        """Take part in the check, and wait until the first process has written."""
        check_equal(state)
        with together():
            pass


class OthersMetrics(Metrics):
    """What takes the place of metrics.jsonl in a process that writes none."""

    def __init__(self) -> None:
        self.doubtful = ""

    def append(self, rows: Iterable[Json]) -> None:
        """Drop the rows."""

    def sync(self) -> None:
        """Do nothing."""

    def sums(self) -> Json:
        """Give nothing."""
        return {}


def checkpoints_in(folder: Path) -> Checkpoints:
    """Give a folder's checkpoints, for the process that writes them."""
    return Checkpoints(folder) if TEAM.count == 1 else FirstCheckpoints(folder)


def run_of_first(make: Callable[[], Run]) -> Run:
    """Give the run that the first process opens or makes; the others know its path and settings."""
    if TEAM.count == 1:
        return make()

    def facts() -> list[Any]:
        run = make()
        return [str(run.path), run.config, run.is_sealed]

    path, config, is_sealed = from_first(facts)
    watch.tell(resume=path)
    return Run(Path(path), config, is_sealed)


def command(folder: Path) -> str:
    """Give the command that goes on with a run.

    >>> command(Path("runs/digits"))
    'forwax train --resume runs/digits'
    """
    return f"forwax train{' --distributed' * (TEAM.count > 1)} --resume {folder}"


@contextmanager
def files_of_first(
    opening: AbstractContextManager[Opened], like: Any
) -> Iterator[Opened]:
    """Open a run's files in the first process; the others get its state and write nothing.

    Args:
        opening: opens them.
        like: a state with the right structure, shapes and dtypes.
    """
    if TEAM.count == 1:
        with opening as files:
            yield files
        return
    with ExitStack() as stack:
        with together():
            metrics, checkpoints, found = (
                stack.enter_context(opening)
                if TEAM.index == 0
                else (OthersMetrics(), OthersCheckpoints(), Checkpoint(None, 0.0, {}))
            )
        begun, seconds = from_first(lambda: [found.state is not None, found.seconds])
        state = shared(found.state, like) if begun else None
        yield metrics, checkpoints, Checkpoint(state, seconds, found.notes)


def check_equal(state: Any) -> None:
    """Compare a state over all processes, by a SHA-256 of each.

    Raises:
        UnequalError: naming the step, and the processes that have the same among themselves.
    """
    sums = json.dumps(leaf_sums(jax.device_get(state))).encode()
    rows = gathered(np.frombuffer(hashlib.sha256(sums).digest(), np.uint8))
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.tobytes(), []).append(index)
    if len(groups) == 1:
        return
    TEAM.ends_together = True
    told = " and of ".join(
        f"process{'es' * (len(each) > 1)} {', '.join(map(str, each))}"
        for each in groups.values()
    )
    raise UnequalError(
        f"after step {int(state.step)} the parameters of {told} differ, so nothing was saved: the "
        "last checkpoint is from before. Start all processes again with --resume; where it comes "
        "again, look for unlike processors, versions of jax or a faulty machine "
        f"(told by {process(TEAM.index)})."
    )


def check_data(checksum: str) -> None:
    """Refuse data that are not those of the first process.

    Raises:
        UsageError: naming the process.
    """
    first = from_first(lambda: checksum)
    with together():
        if checksum != first:
            raise UsageError(
                "its data are not those of process 0 (their checksums differ); give it the same "
                "with --data-dir or FORWAX_DATA."
            )
