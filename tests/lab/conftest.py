"""Fixtures for the tests of the command line: no network, no cache of a user's, tiny data sets."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import jax
import pooch
import pytest
from jax.experimental.compilation_cache import compilation_cache

from forwax.lab.data.sets import SOURCES


@pytest.fixture(scope="module", autouse=True)
def promotes():
    """Optax, by which the lab trains, mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def isolated_data(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache, no FORWAX_DATA, and a network that is down; gives the cache."""

    def refuse(self, url, output_file, pooch, check_only=False):
        raise OSError("the tests have no network")

    cache = tmp_path_factory.mktemp("forwax-cache")
    monkeypatch.setenv("FORWAX_CACHE", str(cache))
    monkeypatch.delenv("FORWAX_DATA", raising=False)
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", refuse)
    return cache


@pytest.fixture(scope="session")
def datafiles() -> ModuleType:
    """The module datafiles.py, which this folder's tests cannot import by name."""
    spec = importlib.util.spec_from_file_location(
        "datafiles", Path(__file__).with_name("datafiles.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while they are made
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datafiles", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def write_tiny(datafiles, monkeypatch):
    """A function like `datafiles.write` that also makes `load` accept the tiny set's checksums."""

    def write(name: str, root: Path, **options):
        tiny = datafiles.write(name, root, **options)
        monkeypatch.setitem(SOURCES, name, tiny.source)
        return tiny

    return write


@pytest.fixture
def tiny_data(write_tiny, tmp_path, monkeypatch) -> Path:
    """Tiny mnist, fashion-mnist and cifar10 in a folder that FORWAX_DATA names."""
    root = tmp_path / "tiny-data"
    for name in tuple(SOURCES):
        write_tiny(name, root)
    monkeypatch.setenv("FORWAX_DATA", str(root))
    return root


@pytest.fixture
def remote(write_tiny, tmp_path):
    """A function that gives a tiny set which no local folder holds."""

    def make(name: str):
        tiny = write_tiny(name, tmp_path / "remote")
        shutil.rmtree(tiny.folder)
        return tiny

    return make


@pytest.fixture
def serve(monkeypatch):
    """A function that makes the network hold these pages only, and note each address asked for."""

    def start(pages: dict[str, bytes], fetched: list[str] | None = None) -> None:
        def answer(self, url, output_file, pooch, check_only=False):
            if fetched is not None:
                fetched.append(url)
            if url not in pages:
                raise OSError("404")
            with open(output_file, "wb") as file:
                file.write(pages[url])

        monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)

    return start


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Share compiled programs between a file's tests and the processes that they start."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
