"""Kill, flip, cut and fill the disk of a training run; see that nothing is wrong in silence.

Command: `python benchmarks/faults.py` (tens of minutes on two cores; `--kills 2 --flips 10
--truncations 10 --disks 2` for a look).

kills: runs of digits are killed with SIGKILL after a random time, a third of them while loading and
compiling, and resumed; the end must equal that of the undisturbed run, bit for bit.
flips: one bit of a random file of a folder that is two thirds done. The resumed run must end as the
undisturbed one, or say what is damaged, or be refused with exit code 2 and a sentence.
truncations: a random file of the newest checkpoint is cut or deleted. The resumed run must end as
the undisturbed one.
disks: a process that may write no file larger than a random size. It must end with exit code 4 (2
where not even its folder can be made) and a sentence, and the folder must then resume to the
undisturbed end.
sums: the processor time of the SHA-256 sums beside that of a whole save, for 64 MiB.

Exits with 1 if anything else is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

STEPS = 300
KILLED_STEPS = 20_000


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


def leaves(run: Path) -> dict[str, str]:
    """The sums of the arrays of a finished run."""
    import jax

    from forwax.lab.catalogue.settings import Settings
    from forwax.lab.keeping.checkpoints import Checkpoints
    from forwax.lab.keeping.seal import leaf_sums
    from forwax.lab.training.step import init_state

    settings = Settings.from_dict(json.loads((run / "config.json").read_text()))
    like = jax.eval_shape(lambda: init_state(digits(), settings))
    with contextlib.closing(Checkpoints(run / "checkpoints")) as checkpoints:
        found = checkpoints.restore(like)
    assert found is not None
    assert int(found.state.step) == settings.steps
    return leaf_sums(found.state)


@functools.cache
def digits() -> Any:
    from forwax.lab.catalogue.experiments import EXPERIMENTS
    from forwax.lab.catalogue.settings import Settings
    from forwax.lab.training.problem import build_problem

    return build_problem(EXPERIMENTS["digits"], Settings())


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in rows
    ]


def results(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    names = ("test_accuracy", "test_loss", "train_loss", "steps", "seed", "rule")
    return {name: summary[name] for name in names}


def same(run: Path, reference: Path, whole: bool = True) -> bool:
    """Whether two runs ended alike; their metrics too, where these are said to be whole."""
    return leaves(run) == leaves(reference) and (
        not whole
        or (metrics(run) == metrics(reference) and results(run) == results(reference))
    )


def call(*words: str) -> tuple[int | str, str]:
    """Run the command in this process: its exit code, or a traceback, and its standard error."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        from forwax.lab import cli

        try:
            code: int | str = cli.main(["train", "--checkpoint-seconds", "0", *words])
        except (Exception, SystemExit):
            code = traceback.format_exc()
    return code, error.getvalue()


def half_done(parent: Path) -> Path:
    """A folder that was left after two thirds of its steps."""
    from forwax.lab.keeping.checkpoints import Checkpoints

    plain = Checkpoints.save

    def save(self: Any, state: Any, *args: Any, **notes: Any) -> None:
        plain(self, state, *args, **notes)
        if int(state.step) > 2 * STEPS // 3:
            raise KeyboardInterrupt

    with mock.patch.object(Checkpoints, "save", save):
        code, error = call(*small(parent))
    assert code == 130, (code, error)
    run = folder_of(parent)
    assert run is not None
    return run


def small(parent: Path) -> list[str]:
    return [*f"digits --steps {STEPS} --eval-every 100 --runs".split(), str(parent)]


@functools.cache
def compiled(settings: Any) -> Any:
    from forwax.lab.training.program import CompiledTraining

    return CompiledTraining(digits(), settings)


@functools.cache
def score() -> Any:
    from forwax.lab.training.program import scorer

    return scorer(digits(), digits().test)


@contextlib.contextmanager
def compiled_once() -> Any:
    """Compile the one program of these runs once, and end blocks early."""
    from forwax.lab.training import session

    def trainer(problem: Any, settings: Any, state: Any = None) -> Any:
        return compiled(settings).start(settings.learning_rate, settings.seed, state)

    with (
        mock.patch.object(session, "build_trainer", trainer),
        mock.patch.object(session, "scorer", side_effect=lambda *of: score()),
        mock.patch.object(session, "block_size", return_value=20),
    ):
        yield


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest(run: Path) -> Path:
    steps = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name))


def flip(run: Path, draw: random.Random) -> str:
    path = draw.choice([path for path in files_of(run) if path.stat().st_size])
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return str(path.relative_to(run))


def truncate(run: Path, draw: random.Random) -> str:
    path = draw.choice(files_of(newest(run)))
    if draw.random() < 0.25 or not path.stat().st_size:
        path.unlink()
        return f"{path.relative_to(run)} deleted"
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.relative_to(run)} cut to {size}"


def verdict(run: Path, reference: Path) -> str:
    """Resume a damaged folder, and say what came of it; what begins with BAD is a fault."""
    config = (run / "config.json").read_bytes()
    code, error = call("--resume", str(run))
    if isinstance(code, str):
        return f"BAD: traceback\n{code}"
    if "Traceback" in error:
        return f"BAD: traceback on the standard error\n{error}"
    if code == 2:
        return "refused" if error.startswith("forwax: ") else f"BAD: {error}"
    if code != 0:
        return f"BAD: exit code {code}: {error}"
    whole = "metrics.jsonl is damaged" not in error
    # a flip that JSON does not see, as of a space, is none
    (run / "config.json").write_bytes(config)
    if not same(run, reference, whole):
        return f"BAD: another state, {'told: ' + error if error else 'in silence'}"
    if not error:
        return "no effect"
    told = "metrics" if not whole else "a checkpoint"
    return f"told of {told}, the same end"


def damage(
    name: str, count: int, fault: Any, scratch: Path, draw: random.Random
) -> int:
    """Damage and resume a folder so many times; how many went wrong."""
    with compiled_once():
        start = half_done(scratch / "half done")
        whole = shutil.copytree(start, scratch / "whole")
        assert call("--resume", str(whole)) == (0, "")
        seen: Counter[str] = Counter()
        bad = 0
        for number in range(count):
            run = shutil.copytree(start, scratch / "damaged")
            what = fault(run, draw)
            found = verdict(run, whole)
            seen[found.partition(":")[0]] += 1
            is_bad = found.startswith("BAD") or (
                name == "truncations" and found == "refused"
            )
            bad += is_bad
            if is_bad or number < 5 or number % 20 == 19:
                print(f"{name:>12} {number + 1:>4}: {what}: {found}", flush=True)
            shutil.rmtree(run)
    print(f"{name}: {count}: {dict(seen)}; {bad} wrong", flush=True)
    return bad


def fill(count: int, scratch: Path, draw: random.Random) -> int:
    """Let processes meet a largest size of a file; how many went wrong."""
    with compiled_once():
        assert call(*small(scratch / "whole")) == (0, "")
    whole = folder_of(scratch / "whole")
    assert whole is not None
    largest = max(path.stat().st_size for path in files_of(whole))
    codes: Counter[int] = Counter()
    bad = 0
    for number in range(count):
        parent = scratch / f"disk {number}"
        kib = draw.randrange(1, 1 + largest // 1024)
        words = [sys.executable, "-m", "forwax", "train", *small(parent)]
        limited = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *words]
        done = subprocess.run(limited, capture_output=True, text=True, check=False)
        codes[done.returncode] += 1
        run = folder_of(parent)
        is_told = "Traceback" not in done.stderr and done.stderr.count("forwax: ") == 1
        is_right = is_told if done.returncode in (2, 4) else done.returncode == 0
        if run is not None and is_right:
            with compiled_once():
                is_right = call("--resume", str(run)) == (0, "") and same(run, whole)
        bad += not is_right
        if not is_right:
            print(f"disk {number}: {kib} KiB, {done.returncode}: {done.stderr}")
    print(f"disks: {count}: exit codes {dict(codes)}; {bad} wrong", flush=True)
    return bad


def kills(options: argparse.Namespace, scratch: Path, draw: random.Random) -> int:
    """Kill runs and their resumptions; how many folders ended otherwise than undisturbed."""
    if not options.kills:
        return 0
    hits, folders, equal = 0, 0, 0
    run_to_end(train(scratch / "reference", options.steps))
    reference = folder_of(scratch / "reference")
    assert reference is not None
    while hits < options.kills:
        folders += 1
        run, more = kill_one_folder(scratch / f"{folders}", options, draw, hits + 1)
        hits += more
        run_to_end(command("--resume", str(run)))
        result = same(run, reference)
        equal += result
        told = "equal bit for bit" if result else "DIFFERENT"
        print(f"       folder {folders}: {more} kills, {told}", flush=True)
    print(
        f"kills: {hits} in {folders} folders: all resumed; {folders - equal} wrong",
        flush=True,
    )
    return folders - equal


def cost_of_sums(scratch: Path) -> int:
    """The processor time of the sums beside that of a save; 1 if it is over a quarter."""
    import jax

    from forwax.lab.keeping.checkpoints import Checkpoints
    from forwax.lab.keeping.seal import leaf_sums
    from forwax.lab.training.step import TrainState

    saves, sums = [], []
    with contextlib.closing(Checkpoints(scratch / "large")) as checkpoints:
        for step in range(5):
            # as hard to compress as weights are
            weights = jax.random.normal(jax.random.key(step), (16, 1024, 1024))
            state = TrainState(weights, None, None, jax.numpy.int32(step))
            jax.block_until_ready(state)
            started = time.process_time()
            leaf_sums(state)
            sums.append(time.process_time() - started)
            checkpoints.save(state, 0.0)
            saves.append(time.process_time() - started - sums[-1])
    share = min(sums) / min(saves)
    print(
        f"sums of 64 MiB: {min(sums):.3f} s of {min(saves):.3f} s CPU a save, {share:.0%}"
    )
    return int(share > 0.25)


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
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--truncations", type=int, default=200)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--kills-per-run", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=KILLED_STEPS, help="of a run that is killed"
    )
    parser.add_argument("--longest-delay", type=float, default=4.0, help="in seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        bad = damage("flips", options.flips, flip, scratch / "flips", draw)
        bad += damage(
            "truncations", options.truncations, truncate, scratch / "cuts", draw
        )
        bad += fill(options.disks, scratch / "disks", draw)
        bad += cost_of_sums(scratch)
        bad += kills(options, scratch / "kills", draw)
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
