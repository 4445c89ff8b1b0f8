"""`forwax train --distributed`: real processes on one machine, each test with an end of its own."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from forwax.lab import cli
from forwax.lab.commands.train import TrainOptions
from forwax.lab.distributed import join, watch
from forwax.lab.distributed.join import joined
from forwax.lab.distributed.traffic import collective_bytes
from forwax.lab.flags import UsageError
from forwax.lab.keeping.folder import Run

pytestmark = pytest.mark.usefixtures("compile_once")

LIMIT = 240.0
"""Seconds after which a test that still waits has failed."""

HEARTBEAT = 10
WORDS = [
    *("digits", "--steps", "240", "--num-tangents", "2", "--eval-every", "10"),
    *("--checkpoint-seconds", "0"),
]


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """No variables of a launcher that runs the tests."""
    for name in (*os.environ,):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "JAX_NUM_", "JAX_PROCESS_")):
            monkeypatch.delenv(name)


@pytest.fixture
def start(tmp_path):
    """Starts a process of a run, by its number; none outlives the test."""
    started: list[subprocess.Popen] = []
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")

    def begin(index, *words, **variables):
        with (
            (tmp_path / f"out-{index}").open("w") as out,
            (tmp_path / f"err-{index}").open("w") as err,
        ):
            started.append(
                subprocess.Popen(
                    [sys.executable, *words],
                    stdout=out,
                    stderr=err,
                    cwd=tmp_path,
                    env={**os.environ, "XLA_FLAGS": one_device, **variables},
                )
            )
        return started[-1]

    yield begin
    # a child ends with its parent
    children = [pid for process in started for pid in children_of(process)]
    for process in started:
        process.kill()
        process.wait(LIMIT)
    wait_for(lambda: not any(map(is_alive, children)))


def train(*words):
    beats = "--heartbeat-seconds", f"{HEARTBEAT}"
    return "-m", "forwax", "train", *words, "--distributed", *beats


def children_of(process):
    try:
        told = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return []
    return [int(pid) for pid in told.split()]


def is_alive(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_for(condition):
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)
    return found


def free_port(numbers=(0,)):
    for number in numbers:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("no port is free")


def codes(*processes):
    return [process.wait(LIMIT) for process in processes]


def told(folder, index, stream="err"):
    return (folder / f"{stream}-{index}").read_text()


def rows(run):
    return [{**row, "seconds": 0} for row in run.metrics()]


def test_killed_stopped_and_resumed_it_is_one_run(start, tmp_path, monkeypatch):
    """Started by SLURM, by variables and by options; its rows are those of one process."""
    both = (0, 1)

    def checkpoints():
        return {path.name for path in tmp_path.glob("runs/*/checkpoints/[0-9]*")}

    # the port that jax derives from a job
    job = free_port(random.sample(range(61440, 65536), 99)) - 61440 + 4096
    slurm = {
        "SLURM_JOB_ID": f"{job}",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    first, second = (
        start(each, *train(*WORDS), **slurm, SLURM_PROCID=f"{each}") for each in both
    )
    wait_for(lambda: checkpoints() or first.poll() is not None)
    children = children_of(second)
    assert len(children) == 1
    second.kill()
    assert first.wait(HEARTBEAT + 15) == watch.GONE
    (path,) = (tmp_path / "runs").iterdir()
    way_on = f"forwax train --distributed --resume runs/{path.name}"
    assert "process 1 of 2 is gone" in told(tmp_path, 0)
    assert told(tmp_path, 0).strip().endswith(way_on)
    assert told(tmp_path, 1, "out") == ""
    assert "[Gloo]" not in told(tmp_path, 0, "out")
    wait_for(lambda: not is_alive(children[0]))

    before = checkpoints()
    again = "--resume", f"runs/{path.name}", "--checkpoint-seconds", "0"
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    first, second = (
        start(each, *train(*again), **variables, JAX_PROCESS_ID=f"{each}")
        for each in both
    )
    wait_for(lambda: checkpoints() - before or first.poll() is not None)
    second.send_signal(signal.SIGTERM)
    assert codes(first, second) == [143, 143], told(tmp_path, 0)
    assert f"of 240; go on with: {way_on}" in told(tmp_path, 0, "out")
    assert told(tmp_path, 1, "out") == ""

    place = "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", "2"
    processes = [
        start(each, *train(*again, *place, "--process-id", f"{each}")) for each in both
    ]
    assert codes(*processes) == [0, 0], told(tmp_path, 0)
    assert list((tmp_path / "runs").iterdir()) == [path]
    run = Run.open(path)
    summary = run.summary()
    assert summary["num_processes"] == summary["num_devices"] == 2
    assert "2, in 2 processes; collectives of" in told(tmp_path, 0, "out")

    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    alone = tmp_path / "alone"
    words = [*WORDS, "--data-parallel", "--runs", str(alone)]
    assert cli.main(["train", *words]) == 0
    (other,) = map(Run.open, alone.iterdir())
    assert rows(run) == rows(other)
    name = "collective_bytes_per_step"
    assert summary[name] == other.summary()[name] > 0
    assert other.summary()["num_processes"] == 1


def test_gathered_slopes_train_processes_to_the_bits_of_one(start, tmp_path, optimised):
    """2 and 4 processes of a device each, and one process with as many, on every process."""
    script = str(Path(__file__).with_name("gathered.py"))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    alone = start(9, script, "0", "1", "0", "2", "4", XLA_FLAGS=flags)
    assert codes(alone) == [0], told(tmp_path, 9)
    lines = told(tmp_path, 9, "out").splitlines()
    expected = dict(zip((2, 4), map(json.loads, lines), strict=True))
    for count in (2, 4):
        port = f"{free_port()}"
        processes = [
            start(each, script, port, f"{count}", f"{each}", f"{count}")
            for each in range(count)
        ]
        assert codes(*processes) == [0] * count, told(tmp_path, 0)
        for each in range(count):
            found = json.loads(told(tmp_path, each, "out").splitlines()[-1])
            assert found == expected[count]
        # of each device k slopes, and of all a mean: 4 (k + 1) that a process sends
        for _, received in expected[count].values():
            assert received == 4 * 3 * count + 4


def test_what_two_processes_agree_on(start, tmp_path):
    words = str(Path(__file__).with_name("pair.py")), f"{free_port()}"
    both = (0, 1)
    results = [tmp_path / f"told-{each}" for each in both]
    processes = [
        start(each, *words, f"{each}", str(tmp_path), str(results[each]))
        for each in both
    ]
    assert codes(*processes) == [0, 0], told(tmp_path, 0) + told(tmp_path, 1)
    here, there = (json.loads(each.read_text()) for each in results)
    for found in (here["agreement"], there["agreement"]):
        assert found["plan"] == [3, False, True, 143]
        assert found["first"] == ["first", 0.1, 0]
        assert found["last"] == "True"
        a, b, c = found["bits"]
        assert (a[:8], a[16:], b, c) == ("00000080", "c2160100", "0100", "0080")
        assert (
            found["OSError"]
            == "DiskError process 1 of 2: x cannot be written: No space left."
        )
        assert found["KeyError"] == "UsageError process 1 of 2: KeyError: 'y'"
        assert found["after"] == 1
    for name, (kind, error) in {
        "other_options": ("UsageError", "process 1 of 2: other options than process 0"),
        "other_data": ("UsageError", "process 1 of 2: its data are not those"),
        "no_folder": ("UsageError", "process 0 of 2: Cannot make a run's folder"),
    }.items():
        assert here[name] == there[name]
        assert here[name][0] == kind
        assert here[name][1].startswith(error)
    assert "--steps is 7 here and 6 there" in here["other_options"][1]
    for code, error, kept in (here["flipped"], there["flipped"]):
        assert code == join.UNEQUAL
        assert "after step 3 the parameters of process 0 and of process 1" in error
        assert kept == ["1"]
    assert not (tmp_path / "of-1").exists()


def test_one_that_never_comes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--distributed", "--num-processes", "2", "--process-id", "1"]
    words += ["--coordinator-address", f"127.0.0.1:{free_port()}"]
    code = (
        "import sys; from forwax.lab import cli; from forwax.lab.distributed import watch\n"
        f"watch.START_SECONDS = 2; sys.argv[1:] = {words}; cli.script()"
    )
    assert watch._as_parent([sys.executable, "-c", code]) == watch.GONE
    captured = capfd.readouterr()
    assert "forwax: not all processes came within 300 seconds." in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", join.TASKS)
def test_several_tasks_are_refused_without_the_flag(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(name, "2")
    folder = tmp_path / "runs"
    assert cli.main(["train", "--runs", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"one of several tasks ({name}=2)" in error
    assert "With --distributed they train one run together; with --no-dist" in error
    assert not folder.exists()
    with joined(TrainOptions(distributed=False)):
        pass
    monkeypatch.setenv(name, "1")
    with joined(TrainOptions()):
        pass


def test_options_that_do_not_go_together(monkeypatch):
    def message(**options):
        with pytest.raises(UsageError) as caught, joined(TrainOptions(**options)):
            pass
        return str(caught.value)

    assert message(process_id=1) == "--process-id: this needs --distributed."
    place = {"distributed": True, "coordinator_address": "localhost:1"}
    told = message(**place, num_processes=2, process_id=2)
    assert told == "--process-id must be below the 2 processes, got 2."
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    told = message(**place, num_processes=2)
    assert told == "JAX_PROCESS_ID must be a whole number, got 'first'."


def test_what_jax_is_left_to_find(monkeypatch):
    assert join._arguments(TrainOptions()) == {}
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    assert join._arguments(TrainOptions()) == {"coordinator_address": "a:1"}
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    whole = {
        "coordinator_address": "b:1",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert join._arguments(TrainOptions(coordinator_address="b:1")) == whole
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(join.importlib.util, "find_spec", lambda name: name)
    found = join._arguments(TrainOptions())
    assert found == {"cluster_detection_method": "mpi4py"}
    # what older ones tell, jax reads by itself
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "x")
    assert join._arguments(TrainOptions()) == {}


def test_spreading_over_one_device_is_told(tmp_path, monkeypatch, capsys):
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    words = ["train", "--steps", "1", "--num-tangents", "2", "--runs", str(tmp_path)]
    assert cli.main([*words, "--data-parallel"]) == 0
    assert "--data-parallel changes nothing: there is one device." in (
        capsys.readouterr().out
    )
    (run,) = map(Run.open, tmp_path.iterdir())
    found = run.summary()
    assert found["num_devices"] == found["num_processes"] == 1
    assert found["collective_bytes_per_step"] == 0


def test_bytes_of_loops_branches_and_work_beside_other_work():
    text = """
%body (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %r = (f32[2]{0}, s8[3]{0}) all-reduce(%p, %q), to_apply=%add
}

%left (p: f32[2]) -> f32[2] {
  ROOT %g = bf16[8]{0} all-gather(%p), dimensions={0}
}

%right (p: f32[2]) -> f32[2] {
  ROOT %g = f32[2]{0} copy(%p)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %w = f32[2]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = f32[2]{0} while(%w), condition=%c, body=%body
  %b = f32[2]{0} conditional(%i, %v, %v), branch_computations={%left, %right}
  %e = f32[2]{0} conditional(%i, %b, %b), true_computation=%right, false_computation=%left
  %s = (f32[2]{0}, f32[4]{0}) all-gather-start(%b), dimensions={0}
  ROOT %d = f32[4]{0} all-gather-done(%s)
}
"""
    assert collective_bytes(text) == 6 * (8 + 3) + 16 + 16 + 16
