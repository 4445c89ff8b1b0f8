"""Memory of long runs: steps of `forwax train`, calls of a compiled `update`, checkpoints alone.

Command: `python benchmarks/soak.py` (minutes on two cores; `--steps 5000` for a look). Resident
memory is that of the whole process, after 1,000 of 200,000 steps or calls, 50 of 300 checkpoints,
and at the end. Exits with 1 where it has grown by more than 2 %. `forwax train` has a checkpoint
each second, of which the first brings its library's memory: the steps are counted behind it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FIRST = 1_000
ALLOWED = 1.02
PAGE = resource.getpagesize()


class Sample(NamedTuple):
    """How far a process is, and its resident memory."""

    step: int
    num_bytes: int


def resident(process: int) -> int:
    """The resident memory of a process, in bytes."""
    statm = Path(f"/proc/{process}/statm").read_text(encoding="ascii")
    return int(statm.split()[1]) * PAGE


def last_step(metrics: Path) -> int:
    """The last step in metrics.jsonl; 0 before there is one."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        for line in reversed(file.read().splitlines()):
            try:
                return json.loads(line)["step"]
            except ValueError:  # a line that is being written
                continue
    return 0


def train(steps: int, pace: float, scratch: Path) -> list[Sample]:
    """Samples of a run of `forwax train digits`, from its first checkpoint on."""
    words = ["train", "digits", "--steps", str(steps), "--runs", str(scratch)]
    words += ["--checkpoint-seconds", str(pace)]
    child = subprocess.Popen(
        [sys.executable, "-m", "forwax", *words], stdout=subprocess.DEVNULL
    )
    found: list[Sample] = []
    while child.poll() is None:
        time.sleep(0.2)
        for metrics in scratch.glob("*/metrics.jsonl"):
            step = last_step(metrics)
            is_kept = any(metrics.parent.glob("checkpoints/*[0-9]"))
            # behind the last step it draws
            if is_kept and FIRST <= step < steps and child.poll() is None:
                found.append(Sample(step, resident(child.pid)))
    if child.returncode:
        raise SystemExit(f"forwax train ended with {child.returncode}.")
    return found


def update(steps: int) -> list[Sample]:
    """Samples of this process while it calls a compiled `update`."""
    import jax
    import jax.numpy as jnp

    import forwax as fx

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    rule = fx.WeightPerturbation(num_tangents=4)
    step = jax.jit(fx.update(loss, rule, learning_rate=0.1))
    key, params, x = jax.random.key(0), jnp.ones((8, 4)), jnp.ones((16, 8))
    found: list[Sample] = []
    for number in range(1, steps + 1):
        _, params = step(jax.random.fold_in(key, number), params, x)
        if number % FIRST == 0:
            params.block_until_ready()
            found.append(Sample(number, resident(os.getpid())))
    return found


def checkpoints() -> list[Sample]:
    """Samples of this process while it writes checkpoints of a small state."""
    import jax.numpy as jnp

    from forwax.lab.keeping.checkpoints import Checkpoints
    from forwax.lab.training.step import TrainState

    found: list[Sample] = []
    with tempfile.TemporaryDirectory() as scratch:
        writer = Checkpoints(Path(scratch))
        for number in range(1, 301):
            params = {"w": jnp.ones((64, 32))}
            writer.save(TrainState(params, (), None, jnp.int32(number)), 0.1)
            if number % 50 == 0:
                found.append(Sample(number, resident(os.getpid())))
    return found


def told(name: str, samples: Sequence[Sample]) -> bool:
    """Print a row, and say whether the memory stayed."""
    first, last = samples[0], samples[-1]
    most = max(sample.num_bytes for sample in samples)
    growth = last.num_bytes / first.num_bytes
    print(
        f"| {name} | {first.step:,}: {first.num_bytes / 2**20:.1f} MiB | {last.step:,}: "
        f"{last.num_bytes / 2**20:.1f} MiB | {most / 2**20:.1f} MiB | {growth:.4f} |",
        flush=True,
    )
    return growth <= ALLOWED


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--checkpoint-seconds", type=float, default=1.0)
    options = parser.parse_args(given)
    steps, pace = options.steps, options.checkpoint_seconds
    print("| | after | at the end | most | end over start |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        stayed = [told("`forwax train digits`", train(steps, pace, Path(scratch)))]
    stayed.append(told("`update`, compiled", update(steps)))
    stayed.append(told("checkpoints alone", checkpoints()))
    return 0 if all(stayed) else 1


if __name__ == "__main__":
    sys.exit(main())
