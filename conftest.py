"""Strict settings for every test: eight fake devices, no implicit promotion, warnings are errors.

Programs compile in less than half of the time and run slower, but for those that a test measures.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = (
    "1"  # for processes that tests start, too
)

import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

QUICK = "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
"""Small programs are compiled in one piece, by the older way: half of the processor's time."""


def are_known(flags: str) -> bool:
    """Whether this version of XLA has the flags; it ends a process that is given others."""
    environment = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def pytest_configure(config: pytest.Config) -> None:
    """Workers, and processes that tests start, inherit the flags and the seed."""
    os.environ.setdefault("FORWAX_SEED", str(int(time.time())))
    is_new = QUICK not in os.environ["XLA_FLAGS"] and not config.option.collectonly
    if is_new and are_known(QUICK):
        os.environ["XLA_FLAGS"] += f" {QUICK}"


def pytest_report_header() -> str:
    """Of the programs that `pytest -m slow` runs."""
    return f"random programs: FORWAX_SEED={os.environ['FORWAX_SEED']}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Warnings of tests and of their imports are errors.

    In pyproject.toml the filter would also hold while plugins configure themselves, and end the run
    for what whichever is installed warns of.
    """
    session.config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that mixes dtypes on purpose says so: `@pytest.mark.promotes("why")`."""
    mark = request.node.get_closest_marker("promotes")
    if mark is None:
        yield
        return
    assert mark.args, "expected a reason"
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Programs are compiled as users compile them: for tests of what they cost."""
    name = "jax_disable_most_optimizations"
    jax.config.update(name, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "0")
        yield
    jax.config.update(name, True)
