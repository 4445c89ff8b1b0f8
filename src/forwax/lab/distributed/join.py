"""How a process finds the others of its run, and how it leaves them."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from forwax.lab.data import DataError
from forwax.lab.distributed import watch
from forwax.lab.distributed.keep import UnequalError
from forwax.lab.distributed.signals import INTERRUPTED
from forwax.lab.distributed.team import TEAM, from_first, gathered, process, together
from forwax.lab.flags import UsageError, flag
from forwax.lab.keeping.disk import NOT_WRITTEN, refused
from forwax.lab.report import Json

UNEQUAL = 5
"""The exit code where processes that should have the same parameters have not."""

TASKS = (
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "JAX_NUM_PROCESSES",
)
"""Where launchers say how many tasks they have started."""

NAMES = {"coordinator_address": str, "num_processes": int, "process_id": int}
"""What jax must know of the processes; also the environment's JAX_COORDINATOR_ADDRESS and so on."""

OWN = (*NAMES, "data_dir", "runs", "heartbeat_seconds")
"""The options in which the processes of one run may differ."""

# what collectives, and jax's own service, say of a peer that is gone
_LOST = (
    "Gloo",
    "NCCL",
    "Connection reset",
    "Connection closed",
    "heartbeat",
    "coordination",
)


@contextmanager
def joined(options: Any) -> Iterator[None]:
    """Train with the other processes while the context lasts, where the options ask for it.

    Args:
        options: `TeamOptions`, and those of a command.

    Raises:
        UsageError: when this is one of several tasks and the options do not say what that means,
            when the others are not to be found, or when they were given other options.
        SystemExit: where this process fails and no other does.
    """
    _check(options)
    if not options.distributed:
        yield
        return
    is_ours = not jax.distributed.is_initialized()
    if is_ours:
        _initialize(options)
    TEAM.count, TEAM.index = jax.process_count(), jax.process_index()
    TEAM.ends_together = False
    watch.tell(count=TEAM.count, index=TEAM.index)
    try:
        with _quiet() if TEAM.index else nullcontext():
            _compare(options)
            yield
        # the first process is still drawing
        gathered(np.zeros(1, np.int32))
        TEAM.ends_together = True
    except BaseException as error:
        _fail(error, is_ours)
        raise
    finally:
        if TEAM.ends_together and is_ours:
            jax.distributed.shutdown()
        TEAM.count, TEAM.index = 1, 0


def _check(options: Any) -> None:
    """Refuse several tasks that were not asked for, and options that nothing would read."""
    tasks = [
        f"{name}={value}"
        for name in TASKS
        if (value := os.environ.get(name, "")).isdigit() and int(value) > 1
    ]
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        tasks.append("jax.distributed is initialized")
    if options.distributed is None and tasks:
        raise UsageError(
            f"This is one of several tasks ({', '.join(tasks)}), and each would train the same run "
            "in a folder of its own. With --distributed they train one run together; with "
            "--no-distributed each its own, as in a sweep."
        )
    unread = [flag(name) for name in NAMES if getattr(options, name) is not None]
    if unread and not options.distributed:
        raise UsageError(f"{', '.join(unread)}: this needs --distributed.")


def _arguments(options: Any) -> Json:
    """What jax is told of the processes; what is left out it finds by itself."""
    given: Json = {}
    for name, kind in NAMES.items():
        value = getattr(options, name)
        variable = f"JAX_{name.upper()}"
        text = os.environ.get(variable)
        try:
            if value is None and text:
                value = kind(text)
        except ValueError as error:
            raise UsageError(
                f"{variable} must be a whole number, got {text!r}."
            ) from error
        if value is not None:
            given[name] = value
    if len(given) == len(NAMES):
        if given["process_id"] >= given["num_processes"]:
            raise UsageError(
                f"--process-id must be below the {given['num_processes']} processes, got "
                f"{given['process_id']}."
            )
        # devices that are not named would start jax's search for a cluster all the same
        return given | {"cluster_detection_method": "deactivate"}
    # newer Open MPI and other MPIs tell jax nothing; mpi4py does, but only where it is asked for
    is_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ
    is_known = "OMPI_MCA_orte_hnp_uri" in os.environ or "SLURM_JOB_ID" in os.environ
    if is_mpi and not is_known and importlib.util.find_spec("mpi4py"):
        given["cluster_detection_method"] = "mpi4py"
    return given


def _initialize(options: Any) -> None:
    beat = options.heartbeat_seconds
    arguments = _arguments(options)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=watch.START_SECONDS,
            heartbeat_timeout_seconds=beat,
            shutdown_timeout_seconds=beat,
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            "The processes of this run cannot be joined: give each --coordinator-address (host and "
            "port of process 0), --num-processes and --process-id, or start them by srun or "
            f"mpirun. jax says: {' '.join(str(error).split())}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """One process writes to the standard output, and this is another."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _compare(options: Any) -> None:
    """Refuse options that are not those of the first process."""
    mine = {
        each.name: str(getattr(options, each.name))
        for each in fields(options)
        if each.name not in OWN
    }
    first = from_first(lambda: mine)
    changed = [name for name in mine if mine[name] != first[name]]
    with together():
        if changed:
            told = (
                f"{flag(x)} is {mine[x]} here and {first[x]} there" for x in changed
            )
            raise UsageError(f"other options than process 0: {'; '.join(told)}.")


def _fail(error: BaseException, is_ours: bool) -> None:
    """End a process that fails alone; the others must not be waited for.

    Raises:
        SystemExit: in a process that is not a child of ours.
    """
    if isinstance(error, UnequalError):
        print(f"forwax: {error}", file=sys.stderr, flush=True)
        raise SystemExit(UNEQUAL) from error
    if TEAM.ends_together:
        return
    code = _told(error)
    if is_ours and watch.LINK is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        # at its end Python would wait for the others, by jax's own exit function
        os._exit(code)
    raise SystemExit(code) from error


def _told(error: BaseException) -> int:
    """Say what failed in this process alone, and give the exit code."""
    me = process(TEAM.index)
    code = 1
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
    if isinstance(error, UsageError | DataError):
        sentence, code = f"{me}: {error}", 2
    elif isinstance(error, OSError):
        sentence, code = f"{me}: {refused(error)}", NOT_WRITTEN
    elif any(word in str(error) for word in _LOST):
        sentence, code = watch.last_words(watch.FACTS), watch.GONE
    else:
        traceback.print_exception(error, file=sys.stderr)
        sentence = f"{me} failed."
    print(f"forwax: {sentence}", file=sys.stderr, flush=True)
    return code
