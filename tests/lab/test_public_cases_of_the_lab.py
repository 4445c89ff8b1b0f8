"""Problems that people had in public with commands, displays and data: a test for each thread."""

import os
import shutil
import subprocess
import sys

import pytest

from forwax.lab import cli


def test_a_picture_without_a_display(tmp_path):
    """icecream#6 (swing-research), TensorLayer#25, Wan2GP#378: MPLBACKEND asks for a window.

    In a process of its own: matplotlib reads the variable once.
    """
    shown = ("DISPLAY", "WAYLAND_DISPLAY")
    env = {name: x for name, x in os.environ.items() if name not in shown}
    picture = tmp_path / "o.png"
    words = ["optimize", "beale", "--iterations", "20", "--runs", "2"]
    command = [sys.executable, "-m", "forwax", *words, "--out", str(picture)]
    done = subprocess.run(
        command, env=env | {"MPLBACKEND": "TkAgg"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 0


def test_a_set_without_a_network(isolated_data, capsys):
    """vision#3549 (pytorch), lightning-bolts#632: which file, which address, where to put it."""
    assert cli.main(["train", "mnist-logistic", "--steps", "2"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    for part in ("mnist", "FORWAX_DATA", "--data-dir", "https://"):
        assert part in text
    assert "Traceback" not in text


@pytest.mark.usefixtures("isolated_data")
def test_mnist_as_torchvision_wrote_it(write_tiny, tmp_path, capsys):
    """vision#1938 (pytorch), deeplearning-models#51 (rasbt): ROOT/MNIST/raw is there already."""
    tiny = write_tiny("mnist", tmp_path / "elsewhere", gz=True)
    root = tmp_path / "torch"
    shutil.copytree(tiny.folder, root / "MNIST" / "raw")
    assert cli.main(["data", "mnist", "--data-dir", str(root)]) == 0
    assert "checksums verified" in capsys.readouterr().out
