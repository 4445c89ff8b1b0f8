"""Data sets: formats, where they are looked for, what each fault says, and that nothing is ever half-written."""

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pooch
import pytest

from forwax.lab import data_command
from forwax.lab.data import DataError, cache_dir, fetching, find_source, load, locate, names
from forwax.lab.data.formats import decode_cifar, decode_idx, decompress

PUBLIC = ("mnist", "fashion-mnist", "cifar10")


def assert_equals_tiny(data, tiny):
    np.testing.assert_array_equal(data.train_images, tiny.images["train"])
    np.testing.assert_array_equal(data.train_labels, tiny.labels["train"])
    np.testing.assert_array_equal(data.test_images, tiny.images["test"])
    np.testing.assert_array_equal(data.test_labels, tiny.labels["test"])


def serve(monkeypatch, pages: dict[str, bytes], fetched: list[str] | None = None) -> None:
    """A network that holds these pages only."""

    def answer(self, url, output_file, pooch, check_only=False):
        if fetched is not None:
            fetched.append(url)
        if url not in pages:
            raise OSError("404")
        with open(output_file, "wb") as file:
            file.write(pages[url])

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)


def pages_of(tiny) -> dict[str, bytes]:
    """What a set's public home serves."""
    if not tiny.source.archive:
        return {f"{tiny.source.home}{file}.gz": gzip.compress(content) for file, content in tiny.contents.items()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file, content in {"readme.html": b"hello", **tiny.contents}.items():
            member = tarfile.TarInfo(f"{tiny.source.folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return {tiny.source.home: packed.getvalue()}


@pytest.fixture
def remote(write_tiny, tmp_path):
    """A function that gives a tiny set which no local folder holds."""

    def make(name: str):
        tiny = write_tiny(name, tmp_path / "remote")
        shutil.rmtree(tiny.folder)
        return tiny

    return make


# Loading


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", PUBLIC)
def test_standard_files_load_from_a_given_folder(name, gz, write_tiny, tmp_path):
    tiny = write_tiny(name, tmp_path, gz=gz)
    data = load(name, tmp_path)
    assert_equals_tiny(data, tiny)
    assert (data.name, data.num_classes, len(data.class_names), data.scale) == (name, 10, 10, 255)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_cifar_planes_become_channels_in_the_order_red_green_blue():
    record = bytes([3]) + bytes([10] * 1024) + bytes([20] * 1024) + bytes([30] * 1023 + [31])
    images, labels = decode_cifar(record)
    assert labels.tolist() == [3]
    assert images[0, 0, 0].tolist() == [10, 20, 30]
    assert images[0, 31, 31].tolist() == [10, 20, 31]


def test_idx_images_are_row_major():
    (images,) = decode_idx(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)]))
    assert images[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_digits_are_a_fixed_stratified_split():
    data = load("digits")
    assert (data.train_images.shape, data.test_images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.uint8, np.int32)
    assert (data.scale, data.train_images.max(), data.test_images.max()) == (16, 16, 16)
    shares = np.bincount(data.train_labels) / np.bincount(np.concatenate([data.train_labels, data.test_labels]))
    np.testing.assert_allclose(shares, 1437 / 1797, atol=0.005)
    # results are comparable only while every release gives the same split
    digest = hashlib.md5(data.test_images.tobytes() + data.test_labels.tobytes(), usedforsecurity=False).hexdigest()
    assert digest == "95b2704b4499abbdaf0511986fe6049a"


def test_digits_hold_every_image_once():
    from sklearn.datasets import load_digits

    data = load("digits")
    ours = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    theirs = load_digits().data.astype(np.uint8)
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


# Where sets are looked for


def test_data_dir_comes_before_forwax_data_before_the_cache(write_tiny, tmp_path, monkeypatch, isolated_data):
    given, variable = tmp_path / "given", tmp_path / "variable"
    for root in (given, variable, isolated_data):
        write_tiny("mnist", root)
    monkeypatch.setenv("FORWAX_DATA", str(variable))
    source = find_source("mnist")
    assert locate(source, given) == given / "mnist"
    assert locate(source) == variable / "mnist"
    monkeypatch.delenv("FORWAX_DATA")
    assert locate(source) == isolated_data / "mnist"


def test_a_given_folder_without_the_set_falls_through(write_tiny, tmp_path, monkeypatch):
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
def test_a_set_is_fetched_once_and_cached_unpacked(name, remote, monkeypatch, isolated_data):
    tiny, fetched = remote(name), []
    serve(monkeypatch, pages_of(tiny), fetched)
    assert_equals_tiny(load(name), tiny)
    assert sorted(fetched) == sorted(pages_of(tiny))
    assert_equals_tiny(load(name), tiny)
    assert len(fetched) == len(pages_of(tiny))
    assert {path.name: path.read_bytes() for path in (isolated_data / tiny.source.folder).iterdir()} == tiny.contents
    assert [path.name for path in isolated_data.iterdir()] == [tiny.source.folder]


def test_a_server_may_unpack_on_the_way(remote, monkeypatch):
    tiny = remote("mnist")
    serve(monkeypatch, {url: decompress(packed) for url, packed in pages_of(tiny).items()})
    assert_equals_tiny(load("mnist"), tiny)


def test_the_bar_counts_what_the_downloader_reports():
    with fetching.Progress(disable=True) as progress:
        bar = fetching._Bar(progress, "file")
        bar.total = 0
        assert bar.total is None
        bar.total = 10
        bar.update(4)
        assert (progress.tasks[0].completed, bar.total) == (4, 10)
        bar.reset()
        bar.update(10)
        bar.close()
        assert progress.finished


@pytest.mark.parametrize("name", PUBLIC)
def test_a_crash_while_writing_leaves_nothing(name, remote, monkeypatch, isolated_data):
    tiny, written = remote(name), []
    serve(monkeypatch, pages_of(tiny))

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


def test_what_a_killed_fetch_left_is_never_read_and_later_swept(remote, monkeypatch, isolated_data):
    tiny = remote("mnist")
    old, young = (isolated_data / f"{fetching.STAGING_PREFIX}{age}" for age in ("old", "young"))
    for folder in (old, young):
        (folder / "mnist").mkdir(parents=True)
        for file in tiny.contents:
            (folder / "mnist" / file).write_bytes(b"half")
    os.utime(old, (0, 0))
    serve(monkeypatch, pages_of(tiny))
    assert_equals_tiny(load("mnist"), tiny)
    assert not old.exists()
    assert young.exists()  # it may belong to a fetch that is still at work


def test_of_two_fetches_at_once_the_first_stays(remote, datafiles, monkeypatch, isolated_data):
    tiny = remote("mnist")
    pages = pages_of(tiny)

    def answer(self, url, output_file, pooch, check_only=False):
        datafiles.write("mnist", isolated_data)
        Path(output_file).write_bytes(pages[url])

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)
    assert_equals_tiny(load("mnist"), tiny)
    assert [path.name for path in isolated_data.iterdir()] == ["mnist"]


# What each fault says


def message(name: str, data_dir: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(name, data_dir)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_an_unknown_set_lists_the_known():
    expected = "Expected a data set's name, but got 'mnst'; choose one of digits, mnist, fashion-mnist, cifar10."
    assert message("mnst") == expected


def test_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    expected = f"Expected a folder of data sets at {gone} (--data-dir), but there is none; correct the path."
    assert message("mnist", gone) == expected
    monkeypatch.setenv("FORWAX_DATA", str(gone))
    assert "(FORWAX_DATA), but there is none" in message("mnist")


def test_a_folder_that_lacks_a_file(write_tiny, tmp_path):
    folder = write_tiny("mnist", tmp_path).folder
    (folder / "t10k-labels-idx1-ubyte").unlink()
    assert message("mnist", tmp_path) == (
        f"Expected all 4 files of mnist in {folder}, but without t10k-labels-idx1-ubyte; "
        "add what is missing, or remove the folder."
    )


@pytest.mark.parametrize("gz", [False, True])
def test_a_wrong_checksum(gz, write_tiny, tmp_path):
    tiny = write_tiny("mnist", tmp_path, gz=gz)
    path = tiny.folder / f"train-labels-idx1-ubyte{'.gz' * gz}"
    content = tiny.contents["train-labels-idx1-ubyte"]
    wrong = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(gzip.compress(wrong) if gz else wrong)
    assert message("mnist", tmp_path) == (
        f"{path} should have md5 {hashlib.md5(content).hexdigest()} once decompressed, "
        f"but has {hashlib.md5(wrong).hexdigest()}; "
        f"put an unchanged copy in its place, or remove {tiny.folder} and run `forwax data mnist`."
    )


@pytest.mark.parametrize(
    ("name", "file", "keep", "expected"),
    [
        ("mnist", "train-images-idx3-ubyte", 1000, "it should hold 47056 bytes by its header, but it holds 1000;"),
        ("mnist", "train-images-idx3-ubyte", 10, "its header takes 16 bytes, but it holds 10;"),
        ("mnist", "t10k-labels-idx1-ubyte", 0, "its header takes 8 bytes, but it holds 0;"),
        ("cifar10", "test_batch.bin", 5000, "it should hold 6146 bytes in records of 3073, but it holds 5000;"),
    ],
)
def test_a_truncated_file(name, file, keep, expected, write_tiny, tmp_path):
    tiny = write_tiny(name, tmp_path)
    (tiny.folder / file).write_bytes(tiny.contents[file][:keep])
    assert message(name, tmp_path).startswith(f"{tiny.folder / file} is truncated: {expected}")


def test_a_file_that_is_too_long(write_tiny, tmp_path):
    tiny = write_tiny("mnist", tmp_path)
    with (tiny.folder / "t10k-labels-idx1-ubyte").open("ab") as file:
        file.write(b"x")
    assert "is too long: it should hold 28 bytes by its header, but it holds 29;" in message("mnist", tmp_path)


def test_a_truncated_gzip_stream(write_tiny, tmp_path):
    path = write_tiny("mnist", tmp_path, gz=True).folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    assert message("mnist", tmp_path).startswith(f"{path} is truncated: its gzip stream ends early;")


def test_a_damaged_gzip_stream(write_tiny, tmp_path):
    path = write_tiny("mnist", tmp_path, gz=True).folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    assert message("mnist", tmp_path).startswith(
        f"{path} is damaged: its gzip stream cannot be unpacked (CRC check failed"
    )


@pytest.mark.parametrize("start", [b"<htm", bytes([0, 0, 13, 3]), bytes([0, 0, 8, 2])])
def test_a_bad_magic_number(start, write_tiny, tmp_path):
    tiny = write_tiny("fashion-mnist", tmp_path)
    path = tiny.folder / "train-images-idx3-ubyte"
    path.write_bytes(start + tiny.contents[path.name][4:])
    assert message("fashion-mnist", tmp_path) == (
        f"{path} has the magic number 0x{start.hex()}, not 0x00000801 (labels) or 0x00000803 (images); "
        f"put an unchanged copy in its place, or remove {tiny.folder} and run `forwax data fashion-mnist`."
    )


def test_a_missing_set_without_a_network(isolated_data):
    assert message("cifar10") == (
        "Expected cifar10 in --data-dir, FORWAX_DATA or the cache, or a network to fetch it, but found no file and got "
        "OSError from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz; connect to the network, or put its "
        "standard files into a folder cifar-10-batches-bin and give the folder above it with --data-dir or FORWAX_DATA."
    )
    assert list(isolated_data.iterdir()) == []


def test_a_refused_address_tells_its_status(monkeypatch):
    class HTTPError(OSError):
        class response:  # noqa: N801
            status_code = 404

    def answer(*_):
        raise HTTPError

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)
    assert "found no file and got HTTPError 404 from https://ossci-datasets" in message("mnist")


def test_a_wrong_download_is_not_kept(remote, monkeypatch, isolated_data):
    tiny = remote("mnist")
    pages = pages_of(tiny)
    last = list(pages)[-1]
    serve(monkeypatch, pages | {last: b"<html>Log in first</html>"})
    assert message("mnist") == (
        f"{last} has the magic number 0x3c68746d, not 0x00000801 (labels) or 0x00000803 (images); "
        "run `forwax data` again, or give the files with FORWAX_DATA or --data-dir."
    )
    assert list(isolated_data.iterdir()) == []


def test_a_damaged_archive(remote, monkeypatch, isolated_data):
    ((url, packed),) = pages_of(remote("cifar10")).items()
    serve(monkeypatch, {url: packed[: len(packed) // 2]})
    assert message("cifar10").startswith(f"{url} gave a truncated or damaged archive; run")
    serve(monkeypatch, {url: b"<html></html>"})
    assert message("cifar10").startswith(f"{url} gave a truncated or damaged archive; run")
    assert list(isolated_data.iterdir()) == []


def test_an_archive_without_a_file(remote, monkeypatch, isolated_data):
    tiny = remote("cifar10")
    del tiny.contents["data_batch_4.bin"]
    serve(monkeypatch, pages_of(tiny))
    assert message("cifar10").startswith(f"{tiny.source.home} gave an archive without data_batch_4.bin; run")
    assert list(isolated_data.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FORWAX_CACHE", str(tmp_path / "file"))
    text = message("mnist")
    assert text.startswith(f"Expected to keep mnist in the cache {tmp_path / 'file'}, but got: ")
    assert text.endswith("; set FORWAX_CACHE to a folder that can be written.")


def test_a_full_disk_is_not_taken_for_the_network(monkeypatch):
    def answer(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)
    assert "No space left on device; set FORWAX_CACHE to a folder that can be written." in message("mnist")


# The command


def test_the_command_tells_where_a_set_was_found(tiny_data, capsys):
    assert data_command.run(data_command.DataOptions("cifar10")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cifar10: found in {tiny_data / 'cifar-10-batches-bin'}, checksums verified"
    assert lines[1] == "  training: 60 images of 32x32x3, uint8 from 0 to 255"
    assert lines[2] == "  test: 20 images of 32x32x3, uint8 from 0 to 255"
    assert lines[4].split() == ["airplane", "6", "2"]
    assert len(lines) == 4 + 10


def test_the_command_fetches_and_then_finds(remote, monkeypatch, isolated_data):
    serve(monkeypatch, pages_of(remote("mnist")))
    folder = isolated_data / "mnist"
    assert data_command.describe("mnist").startswith(f"mnist: fetched, now found in {folder}, checksums verified\n")
    assert data_command.describe("mnist").startswith(f"mnist: found in {folder}, checksums verified\n")


def test_the_table_lists_every_set_and_fetches_none(write_tiny, tmp_path, monkeypatch, capsys):
    write_tiny("mnist", tmp_path)
    (write_tiny("fashion-mnist", tmp_path).folder / "train-images-idx3-ubyte").unlink()
    monkeypatch.setenv("COLUMNS", "500")
    assert data_command.run(data_command.DataOptions(data_dir=tmp_path)) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names())
    assert f"found in {tmp_path / 'mnist'}" in out
    assert "not here; `forwax data cifar10` fetches it (170 MB)" in out
    assert "but without train-images-idx3-ubyte; add what is missing" in out
