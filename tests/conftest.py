"""Strict settings for every test: eight fake devices, rank promotion raises, warnings are errors (pyproject)."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def compile_quickly():
    """Every program of a file's tests and of the processes that they start compiles in half the time, and runs slower.

    Not for tests of what programs cost.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        yield
    jax.config.update(name, before)
