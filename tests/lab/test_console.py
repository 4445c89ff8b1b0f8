"""Interrupts, disks that are full or gone, and standard streams that are closed or lack signs."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from forwax.lab import cli
from forwax.lab.keeping import checkpoints, metrics
from forwax.lab.keeping.console import patient_streams
from forwax.lab.keeping.folder import Run

pytestmark = pytest.mark.usefixtures("compile_once")
WORDS = [
    "train",
    "--steps",
    "40",
    "--num-tangents",
    "2",
    "--eval-every",
    "20",
    "--checkpoint-seconds",
    "0",
]


def train(folder, *more):
    return cli.main([*WORDS, "--runs", str(folder), *more])


def only_run(folder):
    (path,) = (each for each in folder.iterdir() if each.name.startswith("digits-"))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compile_once):
    """What an undisturbed run reaches."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return Run.open(only_run(folder)).summary()


class Broken(io.RawIOBase):
    """A pipe that nobody reads any more."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        os.close(self.reader)

    def writable(self):
        return True

    def write(self, data):
        return os.write(self.writer, data)

    def fileno(self):
        return self.writer


def broken():
    return io.TextIOWrapper(io.BufferedWriter(Broken()), "utf-8", line_buffering=True)


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding)


def test_a_run_whose_reader_is_gone_trains_to_its_end(
    whole, tmp_path, monkeypatch, capsys
):
    out = broken()
    monkeypatch.setattr(sys, "stdout", out)
    assert train(tmp_path) == 0
    out.close()  # as Python does at its end
    found = Run.open(only_run(tmp_path)).summary()
    assert found["test_accuracy"] == whole["test_accuracy"]
    assert capsys.readouterr().err == ""


def test_processes_without_a_reader_train_to_their_end(tmp_path):
    """As behind `| head -1`, and with `>&-`."""
    command = [sys.executable, "-m", "forwax", *WORDS, "--runs"]
    head = subprocess.Popen(
        [*command, str(tmp_path / "head")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    closed = subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command, str(tmp_path / "closed")],
        stderr=subprocess.PIPE,
    )
    assert head.stdout is not None
    assert head.stdout.readline()
    head.stdout.close()
    for name, process in {"head": head, "closed": closed}.items():
        told = process.communicate()[1].decode()
        assert process.returncode == 0, told
        assert told == ""
        assert Run.open(only_run(tmp_path / name)).summary()["steps"] == 40


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["data"], ["trian"]])
@pytest.mark.parametrize("kind", ["broken", "closed"])
def test_commands_end_without_a_traceback(words, kind, monkeypatch):
    for name in ("stdout", "stderr"):
        each = broken() if kind == "broken" else None
        monkeypatch.setattr(sys, name, each)
    assert cli.main(words) == (2 if words == ["trian"] else 0)


def test_streams_come_back(monkeypatch):
    before = sys.stdout, sys.stderr
    with patient_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "utf-8"])
def test_signs_that_an_encoding_lacks_are_replaced(encoding, monkeypatch):
    out = stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with patient_streams():
        print("3 × 4 … − → ä ∇ ╭─╮ \udcc3")
    told = out.buffer.getvalue().decode(encoding)
    assert told.startswith("3 × 4" if encoding not in ("ascii", "cp437") else "3 x 4")
    if encoding == "ascii":
        assert told == "3 x 4 ... - > ? ? +-+ ?\n".replace("...", ".")


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_help_can_be_printed(command, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream(encoding))
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0


def test_commands_can_be_printed_in_ascii(tmp_path, monkeypatch):
    out = stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    words = f"optimize --iterations 3 --runs 1 --out {tmp_path / 'a.svg'}".split()
    assert cli.main(words) == 0
    assert (
        cli.main(["diagnose", "--rules", "low-rank", "--draws", "2", "--rounds", "1"])
        == 0
    )
    assert b"backprop" in out.buffer.getvalue()


def test_a_path_that_libraries_cannot_open_leaves_no_folder(tmp_path, capsys):
    runs = f"{tmp_path}/r\udcc3\udca4"
    for words in (["train", "--runs"], ["compare", "--out"], ["train", "--resume"]):
        assert cli.main([*words, runs]) == 2
        error = capsys.readouterr().err
        assert "r\\udcc3\\udca4' cannot be used in this locale; choose another" in error
    assert not list(tmp_path.iterdir())


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "words",
    [
        WORDS,
        ["compare", "--steps", "8"],
        ["diagnose", "--draws", "2"],
        ["optimize", "--iterations", "3"],
    ],
    ids=lambda words: words[0],
)
def test_ctrl_c_while_compiling(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.stages.Lowered, "compile", interrupted)
    monkeypatch.setattr("forwax.lab.commands.optimize.descend", interrupted)
    assert cli.main(words) == 130
    captured = capsys.readouterr()
    assert "Stopped" in captured.out + captured.err


def test_ctrl_c_ends_a_process_that_compiles(tmp_path):
    words = ["train", "--runs", str(tmp_path), "--num-tangents", "65"]
    command = [sys.executable, "-m", "forwax", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(b"Run:"):
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130, error
    assert b"Stopped" in out + error
    assert b"Traceback" not in error


def refuse(number):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number), "a file")

    return refused


def full_in_orbax(self, *args, **kwargs):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 64 bytes to a file")


@pytest.mark.parametrize(
    ("where", "fault", "told"),
    [
        ((metrics.Metrics, "append"), refuse(errno.ENOSPC), "No space left on device"),
        ((metrics.Metrics, "append"), refuse(errno.EDQUOT), "quota exceeded"),
        ((metrics.Metrics, "sync"), refuse(errno.EIO), "Input/output error"),
        ("orbax.checkpoint.Checkpointer.save", full_in_orbax, "RESOURCE_EXHAUSTED"),
        ("forwax.lab.style.save", refuse(errno.EFBIG), "File too large"),
        ("forwax.lab.report.write_json", refuse(errno.EROFS), "Read-only file system"),
    ],
)
def test_a_disk_that_refuses(whole, tmp_path, monkeypatch, capsys, where, fault, told):
    with monkeypatch.context() as patch:
        plain = checkpoints.Checkpoints.save

        def save(self, *args, **notes):
            plain(self, *args, **notes)
            patch.setattr(*([where] if isinstance(where, str) else where), fault)

        # the disk fills after the first checkpoint
        patch.setattr(checkpoints.Checkpoints, "save", save)
        assert train(tmp_path) == 4
    error = capsys.readouterr().err
    path = only_run(tmp_path)
    assert error.startswith("forwax: ")
    assert error.count("\n") == 1
    assert told in error
    assert (
        "is kept; once there is room again, go on with: forwax train --resume " in error
    )
    assert str(path) in error
    assert cli.main(["train", "--resume", str(path)]) == 0
    assert capsys.readouterr().err == ""
    found = Run.open(path).summary()
    for name in ("test_accuracy", "test_loss", "train_loss"):
        assert found[name] == whole[name]


def test_a_folder_that_vanishes(tmp_path, monkeypatch, capsys):
    plain = checkpoints.Checkpoints.save

    def save(self, *args, **notes):
        plain(self, *args, **notes)
        shutil.rmtree(only_run(tmp_path))

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    assert train(tmp_path) == 4
    assert "No such file or directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_a_real_process(tmp_path):
    """`ulimit -f` makes writing behind 16 KiB fail, as a full disk does."""
    words = [sys.executable, "-m", "forwax", *WORDS, "--runs", str(tmp_path)]
    words[words.index("40")] = "400"
    limited = ["sh", "-c", 'ulimit -f 32; exec "$@"', "sh", *words]
    # a cache of compiled programs would be torn as well
    alone = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        limited, capture_output=True, text=True, check=False, env=alone
    )
    assert done.returncode == 4, done.stderr
    path = only_run(tmp_path)
    assert f"go on with: forwax train --resume {path}" in done.stderr
    assert "Traceback" not in done.stderr
    assert cli.main(["train", "--resume", str(path)]) == 0
    assert len(Run.open(Path(path)).metrics()) == 420
