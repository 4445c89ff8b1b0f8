"""Strict settings for every test: eight fake devices, rank promotion raises, warnings are errors (pyproject)."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import contextlib
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@contextlib.contextmanager
def few_optimizations() -> Iterator[None]:
    """Compile this way while the context lasts, in other processes too."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        yield
    jax.config.update(name, before)


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """Every program of a file's tests and of the processes that they start compiles in half the time, and runs slower.

    Not for tests of how fast programs are.
    """
    with few_optimizations():
        yield


@pytest.fixture(autouse=True)
def compile_examples_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for the examples of docstrings."""
    with (
        few_optimizations()
        if isinstance(request.node, pytest.DoctestItem)
        else contextlib.nullcontext()
    ):
        yield
