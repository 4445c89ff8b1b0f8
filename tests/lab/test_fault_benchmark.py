"""Ten bit flips and ten truncations of benchmarks/faults.py: nothing is wrong in silence."""

import importlib.util
import random
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("compile_once")
FILE = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("faults", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STEPS = 90
    return module


@pytest.fixture
def faults(benchmark, monkeypatch):
    # the picture has tests of its own
    monkeypatch.setattr(
        "forwax.lab.style.save", lambda figure, path: path.write_bytes(b"curves")
    )
    return benchmark


@pytest.mark.parametrize("name", ["flip", "truncate"])
def test_ten_faults(faults, name, tmp_path, capsys):
    fault = getattr(faults, name)
    bad = faults.damage(f"{name}s", 10, fault, tmp_path, random.Random(7))
    assert bad == 0, capsys.readouterr().out


def test_ten_full_disks(faults, tmp_path, capsys, monkeypatch):
    """In this process: each write of a file behind a random size fails, as with `ulimit -f`."""
    resource = pytest.importorskip("resource")
    draw = random.Random(3)

    def limited(words, **keywords):
        size = int(words[2].split()[2].rstrip(";")) * 1024
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with faults.compiled_once():
                code, error = faults.call(*words[8:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return faults.subprocess.CompletedProcess(words, code, "", error)

    monkeypatch.setattr(faults.subprocess, "run", limited)
    assert faults.fill(10, tmp_path, draw) == 0, capsys.readouterr().out
