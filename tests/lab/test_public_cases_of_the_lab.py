"""Problems that people had in public with commands, displays and data: a test for each thread."""

import shutil

import matplotlib.pyplot as plt
import pytest

from forwax.lab import cli


def test_a_picture_without_a_display(tmp_path, monkeypatch, capsys):
    """icecream#6 (swing-research), TensorLayer#25, Wan2GP#378: MPLBACKEND asks for a window."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    picture = tmp_path / "o.png"
    small = ["--iterations", "20", "--runs", "2", "--out", str(picture)]
    assert cli.main(["optimize", "beale", *small]) == 0
    assert picture.stat().st_size > 0
    assert not plt.get_fignums()


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
