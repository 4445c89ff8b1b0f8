"""One of two processes of tests/lab/test_distributed.py: makes many checks, tells what it found.

Its words: a port, its number, a folder that only process 0 may write to, a file for what it tells.
"""

import contextlib
import io
import json
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from forwax.lab.commands import train
from forwax.lab.commands.train import TrainOptions
from forwax.lab.distributed.join import joined
from forwax.lab.distributed.signals import Signals
from forwax.lab.distributed.team import (
    TEAM,
    from_first,
    in_turn,
    plan,
    shared,
    together,
)
from forwax.lab.flags import UsageError
from forwax.lab.training.program import Trainer

# whoever collects doctests imports this file without the words
PORT, INDEX, FOLDER, TOLD = sys.argv[1:5] if __name__ == "__main__" else "0000"
INDEX, FOLDER = int(INDEX), Path(FOLDER)
ASKED = {
    "distributed": True,
    "runs": FOLDER / f"of-{INDEX}",
    "steps": 6,
    "num_tangents": 2,
    "eval_every": 3,
    "checkpoint_seconds": 0.0,
}


def outcome(**more):
    """The error, the exit code and the standard error of a run."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            return train.run(TrainOptions(**ASKED | more)), errors.getvalue()
        except SystemExit as error:
            return error.code, errors.getvalue()
        except (UsageError, OSError) as error:
            return type(error).__name__, str(error)


def other_options():
    return outcome(steps=6 + INDEX)


def other_data(patch=train.build_problem):
    def of_one_image_less(*words):
        problem = patch(*words)
        object.__setattr__(problem, "checksum", problem.checksum[INDEX:])
        return problem

    train.build_problem = of_one_image_less
    found = outcome()
    train.build_problem = patch
    return found


def no_folder():
    if INDEX == 0:
        FOLDER.joinpath("of-0").write_text("")
    found = outcome()
    if INDEX == 0:
        FOLDER.joinpath("of-0").unlink()
    return found


def flipped(plain=Trainer.run):
    """One bit of one parameter of process 1, after step 3."""

    def run(self, count):
        block = plain(self, count)
        if INDEX == 1 and self.step == 3:
            leaves, form = jax.tree.flatten(self._carry)
            own = np.array(leaves[0].addressable_data(0))
            own.view(np.uint32).reshape(-1)[7] ^= 1
            parts = [jax.device_put(own, jax.local_devices()[0])]
            leaves[0] = jax.make_array_from_single_device_arrays(
                own.shape, leaves[0].sharding, parts
            )
            self._carry = jax.tree.unflatten(form, leaves)
        return block

    Trainer.run = run
    found = outcome()
    Trainer.run = plain
    kept = FOLDER.glob("of-0/*/checkpoints/*")
    return *found, sorted(path.name for path in kept)


def agreement():
    """The team's functions, with errors on one side."""
    found = {}
    with joined(TrainOptions(distributed=True)):
        signals = Signals()
        signals.received = signal.SIGTERM if INDEX else None
        found["plan"] = [*plan(3 + INDEX, INDEX == 1, signals), signals.code]
        found["first"] = from_first(lambda: ["first", 0.1, INDEX])
        order = FOLDER / "order"
        in_turn(lambda: order.write_text(f"{order.exists()}"))
        found["last"] = order.read_text()
        mine = {
            "a": jnp.array([-0.0, jnp.nan, 1e-40]),
            "b": jnp.array([True, False]),
            "c": jnp.array(-0.0, jnp.bfloat16),
        }
        like = jax.eval_shape(lambda: mine)
        got = shared(mine if INDEX == 0 else None, like)
        found["bits"] = jax.tree.leaves(jax.tree.map(lambda x: x.tobytes().hex(), got))
        for error in (OSError(28, "No space left", "x"), KeyError("y")):
            try:
                with contextlib.redirect_stderr(io.StringIO()), together():
                    if INDEX:
                        raise error
            except (UsageError, OSError) as caught:
                found[type(error).__name__] = f"{type(caught).__name__} {caught}"
    found["after"] = TEAM.count
    return found


if __name__ == "__main__":
    # as a launcher does it, before the command
    jax.distributed.initialize(
        f"127.0.0.1:{PORT}",
        2,
        INDEX,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
        heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20,
    )
    checks = agreement, other_options, other_data, no_folder, flipped
    Path(TOLD).write_text(json.dumps({each.__name__: each() for each in checks}))
