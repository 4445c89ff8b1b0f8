"""Kill a training run at random moments; see that every folder resumes to the same bits.

Command: `python benchmarks/kills.py` (about ten minutes on two cores; `--kills 5` for a quick
look).

An uninterrupted run of digits gives the reference. Then runs are started and killed with SIGKILL
after a random time: a third of the kills is timed from the moment the folder appears (loading and
compiling), the others from the first step that is seen in metrics.jsonl. The folder is resumed and
killed again, until it has finished or `--kills-per-run` kills have hit it; then it is resumed to
its end. A kill that comes after the end is not counted. The final state of every folder must equal
the reference's bit for bit, and its metrics must be equal but for times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def command(*words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "forwax.lab.cli",
        "train",
        "--checkpoint-seconds",
        "0.1",
        *words,
    ]


def train(parent: Path, steps: int) -> list[str]:
    return command(
        "digits", "--steps", str(steps), "--eval-every", "500", "--runs", str(parent)
    )


def run_to_end(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(words)} exited with {done.returncode}: {done.stdout}{done.stderr}"
        )


def folder_of(parent: Path) -> Path | None:
    found = [
        path for path in parent.glob("digits-*") if (path / "config.json").exists()
    ]
    return found[0] if found else None


def kill_at(
    words: list[str], parent: Path, from_first_step: bool, delay: float
) -> bool:
    """Start a process and kill it a delay after its folder or a step; False if it had ended."""
    before = metrics_size(folder_of(parent))
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        run = folder_of(parent)
        if run is not None and (not from_first_step or metrics_size(run) != before):
            break
        time.sleep(0.005)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run = folder_of(parent)
    return (
        process.returncode == -signal.SIGKILL
        and run is not None
        and not (run / "summary.json").exists()
    )


def metrics_size(run: Path | None) -> int:
    path = run / "metrics.jsonl" if run else None
    return path.stat().st_size if path and path.exists() else 0


def state_at_kill(run: Path) -> tuple[int, int]:
    """Give the last step in the metrics and the newest checkpoint's step, 0 where there is none."""
    lines = (
        (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        if (run / "metrics.jsonl").exists()
        else []
    )
    steps = [
        path.name for path in (run / "checkpoints").glob("*") if path.name.isdigit()
    ]
    return (json.loads(lines[-1])["step"] if lines else 0), max(
        map(int, steps), default=0
    )


def final_parameters(run: Path) -> list[np.ndarray]:
    import jax

    from forwax.lab.catalogue.experiments import EXPERIMENTS
    from forwax.lab.catalogue.settings import Settings
    from forwax.lab.training.folder import Checkpoints
    from forwax.lab.training.problem import build_problem
    from forwax.lab.training.step import init_state

    settings = Settings.from_dict(json.loads((run / "config.json").read_text()))
    problem = build_problem(EXPERIMENTS["digits"], settings)
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoint = checkpoints.restore(
        jax.eval_shape(lambda: init_state(problem, settings))
    )
    checkpoints.close()
    assert checkpoint is not None
    assert int(checkpoint.state.step) == settings.steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoint.state)]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in rows
    ]


def same(run: Path, reference: Path) -> bool:
    pairs = zip(final_parameters(run), final_parameters(reference), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs) and metrics(
        run
    ) == metrics(reference)


def kill_one_folder(
    parent: Path, options: argparse.Namespace, draw: random.Random, first: int
) -> tuple[Path, int]:
    """Kill a run and its resumptions, a line for each; the folder and how many hit it."""
    words, hits = train(parent, options.steps), 0
    while hits < options.kills_per_run and first + hits <= options.kills:
        from_first_step, delay = (
            draw.random() > 1 / 3,
            draw.uniform(0, options.longest_delay),
        )
        killed = kill_at(words, parent, from_first_step, delay)
        run = folder_of(parent)
        assert run is not None
        if not killed:
            break
        step, checkpoint = state_at_kill(run)
        start = "first step" if from_first_step else "folder"
        print(
            f"{first + hits:>5}{run.parent.name:>8}{delay:>8.2f} s from "
            f"{start:<12}{step:>8}{checkpoint:>12}",
            flush=True,
        )
        hits += 1
        words = command("--resume", str(run))
    run = folder_of(parent)
    assert run is not None
    return run, hits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-per-run", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--longest-delay", type=float, default=4.0, help="in seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, kills, folders, equal = random.Random(options.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        run_to_end(train(Path(scratch) / "reference", options.steps))
        reference = folder_of(Path(scratch) / "reference")
        assert reference is not None
        print(
            f"{'kill':>5}{'folder':>8}{'after':>8}{'':18}{'metrics':>8}{'checkpoint':>12}",
            flush=True,
        )
        while kills < options.kills:
            folders += 1
            run, hits = kill_one_folder(
                Path(scratch) / f"{folders}", options, draw, kills + 1
            )
            kills += hits
            run_to_end(command("--resume", str(run)))
            result = same(run, reference)
            equal += result
            print(
                f"       folder {folders}: {hits} kills, "
                f"{'equal bit for bit' if result else 'DIFFERENT'}",
                flush=True,
            )
    print(
        f"{kills} kills in {folders} folders: all resumed, {equal} of {folders} equal the "
        f"reference bit for bit."
    )
    sys.exit(equal != folders)


if __name__ == "__main__":
    main()
