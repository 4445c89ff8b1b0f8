"""Warnings of tests are errors; those of a plugin that happens to be installed stop no run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = """
import warnings

def pytest_configure(config):
    warnings.warn("a plugin's own")
"""
TESTS = """
import warnings

def test_quiet():
    pass

def test_loud():
    warnings.warn("a test's own")
"""
IMPORT = """
import warnings

warnings.warn("an import's own")
"""


@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_a_plugins_warning_stops_no_run_and_a_tests_own_fails_it(tmp_path, options):
    """Under this project's settings and its conftest.py."""
    (tmp_path / "stub_plugin.py").write_text(PLUGIN, encoding="utf-8")
    (tmp_path / "test_stub.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "test_import.py").write_text(IMPORT, encoding="utf-8")
    for name in ("conftest.py", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {
        key: os.environ[key] for key in os.environ if not key.startswith("PYTEST_")
    }
    options = ["-q", "-p", "stub_plugin", "--continue-on-collection-errors", *options]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_stub.py", "test_import.py"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert "a plugin's own" in said
    assert re.search(r"1 failed, 1 passed, \d errors?", said)  # one in each process
    assert "UserWarning: a test's own" in said
    assert "UserWarning: an import's own" in said
