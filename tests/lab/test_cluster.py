"""The files of examples/cluster: all are read, and SLURM's runs, with an srun of the test's own."""

import ast
import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml

from forwax.lab.commands.train import TrainOptions
from forwax.lab.keeping.folder import Run
from helpers import module_at

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
SBATCH = CLUSTER / "slurm.sbatch"
LIMIT = 240.0
"""Seconds after which a run that is not over has failed."""

SRUN = """#!/bin/bash
# what SLURM tells each of two tasks
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=127.0.0.1 SLURM_LOCALID=0
SLURM_PROCID=1 "$@" > other & other=$!
SLURM_PROCID=0 "$@"
wait $other
"""


def test_the_files_are_these():
    found = sorted(path.name for path in CLUSTER.iterdir() if path.is_file())
    assert found == ["ray_trainer.py", "slurm.sbatch", "trainjob.yaml"]


def of_slurm():
    (line,) = (
        line
        for line in SBATCH.read_text().splitlines()
        if line.startswith("srun forwax ")
    )
    words = shlex.split(line)
    # the caller's own
    assert words.pop() == "$@"
    return words[1:]


def of_kubeflow():
    job = yaml.safe_load((CLUSTER / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == (
        "trainer.kubeflow.org/v1alpha1",
        "TrainJob",
    )
    assert job["spec"]["runtimeRef"]["name"] == "jax-distributed"
    assert job["spec"]["trainer"]["numNodes"] == 2
    return job["spec"]["trainer"]["command"]


def of_ray():
    path = CLUSTER / "ray_trainer.py"
    assert "NOT RUN" in ast.get_docstring(ast.parse(path.read_text()))
    return ["forwax", *module_at(path).WORDS]


@pytest.mark.parametrize("words", [of_slurm, of_kubeflow, of_ray])
def test_the_command_passes_its_parser(words):
    command, name, *options = words()
    assert (command, name) == ("forwax", "train")
    config = (tyro.conf.DisallowNone,)
    read = tyro.cli(TrainOptions, args=options, config=config)
    assert read.distributed


def test_the_batch_text_is_bash_and_slurm_reads_its_lines():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    lines = SBATCH.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    asked = [i for i, line in enumerate(lines) if line.startswith("#SBATCH --")]
    # SLURM stops reading at the first command
    assert len(asked) == 6
    assert max(asked) < first


def job_of_a_free_port():
    """Of a number from which jax derives a port that nobody has."""
    for number in random.sample(range(1 << 12), 99):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 65535 - (1 << 12) + 1 + number))
            except OSError:
                continue
            return f"{(1 << 12) + number}"
    raise AssertionError("no port is free")


def test_slurms_text_trains_one_run_in_two_processes(tmp_path, monkeypatch):
    """The whole file is run by bash, as SLURM would; but for srun, which is no part of it."""
    for name in (*os.environ,):
        if name.startswith(("SLURM_", "OMPI_", "PMI", "JAX_NUM_", "JAX_PROCESS_")):
            monkeypatch.delenv(name)
    forwax = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m forwax "$@"\n'
    for name, text in (("srun", SRUN), ("forwax", forwax)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_ID": job_of_a_free_port(),
        "XLA_FLAGS": flags,
    }
    words = ["--steps", "2", "--num-tangents", "2", "--heartbeat-seconds", "60"]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(
            ["bash", str(SBATCH), *words],
            cwd=tmp_path,
            env={**os.environ, **variables},
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT)
        finally:
            # all that is left of its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = (tmp_path / "told").read_text()
    assert code == 0, said
    (run,) = map(Run.open, (tmp_path / "runs").iterdir())
    summary = run.summary()
    assert summary["num_processes"] == summary["num_devices"] == 2
    assert len(list(run.metrics())) > 0
    assert "2, in 2 processes; collectives of" in said
    assert (tmp_path / "other").read_text() == ""
