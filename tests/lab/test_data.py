"""Data sets: formats, where they are looked for, and that nothing is ever half-written."""

import hashlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pooch
import pytest

from forwax.lab.data import cache_dir, elsewhere, find_source, load, locate, store
from forwax.lab.data.formats import decode_cifar, decode_idx, decompress

PUBLIC = ("mnist", "fashion-mnist", "cifar10")


def assert_equals_tiny(data, tiny):
    np.testing.assert_array_equal(data.train_images, tiny.images["train"])
    np.testing.assert_array_equal(data.train_labels, tiny.labels["train"])
    np.testing.assert_array_equal(data.test_images, tiny.images["test"])
    np.testing.assert_array_equal(data.test_labels, tiny.labels["test"])


# Loading


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", PUBLIC)
def test_standard_files_load_from_a_given_folder(name, gz, write_tiny, tmp_path):
    tiny = write_tiny(name, tmp_path, gz=gz)
    data = load(name, tmp_path)
    assert_equals_tiny(data, tiny)
    assert (data.name, data.num_classes, len(data.class_names), data.scale) == (
        name,
        10,
        10,
        255,
    )
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_sets_as_torchvision_keeps_them(name, folder, gz, write_tiny, tmp_path):
    tiny = write_tiny(name, tmp_path, gz=gz)
    (tmp_path / folder).parent.mkdir()
    tiny.folder.rename(tmp_path / folder)
    assert locate(find_source(name), tmp_path) == tmp_path / folder
    assert_equals_tiny(load(name, tmp_path), tiny)


def test_cifar_as_torchvision_keeps_it(write_tiny, tmp_path, monkeypatch):
    """Pickled dictionaries, known by their md5."""
    tiny = write_tiny("cifar10", tmp_path)
    _, kept = elsewhere.forms(tiny.source)
    folder = tmp_path / kept.folder
    folder.mkdir()
    sums = {}
    for old, new in zip(tiny.contents, kept.checksums, strict=True):
        images, labels = decode_cifar(tiny.contents[old])
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = pickle.dumps({b"data": planes, b"labels": labels.tolist()})
        (folder / new).write_bytes(content)
        sums[new] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    shutil.rmtree(tiny.folder)
    monkeypatch.setattr(elsewhere, "BATCHES", sums)
    assert_equals_tiny(load("cifar10", tmp_path), tiny)


def test_cifar_planes_become_channels_in_the_order_red_green_blue():
    record = (
        bytes([3]) + bytes([10] * 1024) + bytes([20] * 1024) + bytes([30] * 1023 + [31])
    )
    images, labels = decode_cifar(record)
    assert labels.tolist() == [3]
    assert images[0, 0, 0].tolist() == [10, 20, 30]
    assert images[0, 31, 31].tolist() == [10, 20, 31]


def test_idx_images_are_row_major():
    (images,) = decode_idx(
        bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])
    )
    assert images[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_digits_are_a_fixed_stratified_split():
    data = load("digits")
    assert (data.train_images.shape, data.test_images.shape) == (
        (1437, 8, 8, 1),
        (360, 8, 8, 1),
    )
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.uint8, np.int32)
    assert (data.scale, data.train_images.max(), data.test_images.max()) == (16, 16, 16)
    shares = np.bincount(data.train_labels) / np.bincount(
        np.concatenate([data.train_labels, data.test_labels])
    )
    np.testing.assert_allclose(shares, 1437 / 1797, atol=0.005)
    # results are comparable only while every release gives the same split
    digest = hashlib.md5(
        data.test_images.tobytes() + data.test_labels.tobytes(), usedforsecurity=False
    ).hexdigest()
    assert digest == "95b2704b4499abbdaf0511986fe6049a"


def test_digits_hold_every_image_once():
    from sklearn.datasets import load_digits

    data = load("digits")
    ours = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    theirs = load_digits().data.astype(np.uint8)
    np.testing.assert_array_equal(
        ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)]
    )


# Where sets are looked for


def test_data_dir_comes_before_forwax_data_before_the_cache(
    write_tiny, tmp_path, monkeypatch, isolated_data
):
    given, variable = tmp_path / "given", tmp_path / "variable"
    for root in (given, variable, isolated_data):
        write_tiny("mnist", root)
    monkeypatch.setenv("FORWAX_DATA", str(variable))
    source = find_source("mnist")
    assert locate(source, given) == given / "mnist"
    assert locate(source) == variable / "mnist"
    monkeypatch.delenv("FORWAX_DATA")
    assert locate(source) == isolated_data / "mnist"


def test_a_given_folder_without_the_set_falls_through(
    write_tiny, tmp_path, monkeypatch
):
    tiny = write_tiny("mnist", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("FORWAX_DATA", str(tmp_path))
    assert_equals_tiny(load("mnist", empty), tiny)


def test_the_cache_is_the_platforms_unless_given(monkeypatch):
    assert cache_dir() == Path(os.environ["FORWAX_CACHE"])
    monkeypatch.delenv("FORWAX_CACHE")
    assert cache_dir() == Path(pooch.os_cache("forwax")).expanduser()


# Fetching


@pytest.mark.parametrize("name", PUBLIC)
def test_a_set_is_fetched_once_and_cached_unpacked(
    name, remote, isolated_data, serve, datafiles
):
    tiny, fetched = remote(name), []
    serve(datafiles.pages_of(tiny), fetched)
    assert_equals_tiny(load(name), tiny)
    assert sorted(fetched) == sorted(datafiles.pages_of(tiny))
    assert_equals_tiny(load(name), tiny)
    assert len(fetched) == len(datafiles.pages_of(tiny))
    assert {
        path.name: path.read_bytes()
        for path in (isolated_data / tiny.source.folder).iterdir()
    } == tiny.contents
    assert [path.name for path in isolated_data.iterdir()] == [tiny.source.folder]


def test_a_server_may_unpack_on_the_way(remote, serve, datafiles):
    tiny = remote("mnist")
    serve({url: decompress(packed) for url, packed in datafiles.pages_of(tiny).items()})
    assert_equals_tiny(load("mnist"), tiny)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_sees_a_bar(
    is_terminal, remote, serve, datafiles, monkeypatch, capsys
):
    tiny = remote("mnist")
    serve(datafiles.pages_of(tiny))
    answer = pooch.HTTPDownloader.__call__
    bars = []

    def watched(self, *asked):
        bars.append(self.progressbar)
        answer(self, *asked)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", watched)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    load("mnist")
    assert bars == 4 * [is_terminal]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_crash_while_writing_leaves_nothing(
    name, remote, monkeypatch, isolated_data, serve, datafiles
):
    tiny, written = remote(name), []
    serve(datafiles.pages_of(tiny))

    def crash(self, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(self.name)
        self.touch()

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_bytes", crash)
        with pytest.raises(KeyboardInterrupt):
            load(name)
    assert written
    assert list(isolated_data.iterdir()) == []
    assert_equals_tiny(load(name), tiny)


def test_what_a_killed_fetch_left_is_never_read_and_later_swept(
    remote, isolated_data, serve, datafiles
):
    tiny = remote("mnist")
    old, young = (
        isolated_data / f"{store.STAGING_PREFIX}{age}" for age in ("old", "young")
    )
    for folder in (old, young):
        (folder / "mnist").mkdir(parents=True)
        for file in tiny.contents:
            (folder / "mnist" / file).write_bytes(b"half")
    os.utime(old, (0, 0))
    serve(datafiles.pages_of(tiny))
    assert_equals_tiny(load("mnist"), tiny)
    assert not old.exists()
    assert young.exists()  # it may belong to a fetch that is still at work


def test_of_two_fetches_at_once_the_first_stays(
    remote, datafiles, monkeypatch, isolated_data
):
    tiny = remote("mnist")
    pages = datafiles.pages_of(tiny)

    def answer(self, url, output_file, pooch, check_only=False):
        datafiles.write("mnist", isolated_data)
        Path(output_file).write_bytes(pages[url])

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)
    assert_equals_tiny(load("mnist"), tiny)
    assert [path.name for path in isolated_data.iterdir()] == ["mnist"]
