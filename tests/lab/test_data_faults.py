"""Each fault of a data set says what was expected, what came, what to do, and leaves nothing."""

import dataclasses
import gzip
import hashlib
import pickle
import tracemalloc
from pathlib import Path

import pooch
import pytest

from forwax.lab.data import DataError, load
from forwax.lab.data.elsewhere import BATCHES, MIRRORS


def message(name: str, data_dir: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(name, data_dir)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_an_unknown_set_lists_the_known():
    expected = (
        "Expected a data set's name, but got 'mnst'; choose one of digits, "
        "mnist, "
        "fashion-mnist, cifar10."
    )
    assert message("mnst") == expected


def test_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    expected = (
        f"Expected a folder of data sets at {gone} (--data-dir), but there is none; "
        f"correct "
        f"the path."
    )
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
        (
            "mnist",
            "train-images-idx3-ubyte",
            1000,
            "it should hold 47056 bytes by its header, but it holds 1000;",
        ),
        (
            "mnist",
            "train-images-idx3-ubyte",
            10,
            "its header takes 16 bytes, but it holds 10;",
        ),
        (
            "mnist",
            "t10k-labels-idx1-ubyte",
            0,
            "its header takes 8 bytes, but it holds 0;",
        ),
        (
            "cifar10",
            "test_batch.bin",
            5000,
            "it should hold 6146 bytes in records of 3073, but it holds 5000;",
        ),
    ],
)
def test_a_truncated_file(name, file, keep, expected, write_tiny, tmp_path):
    tiny = write_tiny(name, tmp_path)
    (tiny.folder / file).write_bytes(tiny.contents[file][:keep])
    assert message(name, tmp_path).startswith(
        f"{tiny.folder / file} is truncated: {expected}"
    )


def test_a_file_that_is_too_long(write_tiny, tmp_path):
    tiny = write_tiny("mnist", tmp_path)
    with (tiny.folder / "t10k-labels-idx1-ubyte").open("ab") as file:
        file.write(b"x")
    assert (
        "is too long: it should hold 28 bytes by its header, but it holds 29;"
        in message("mnist", tmp_path)
    )


def test_a_truncated_gzip_stream(write_tiny, tmp_path):
    path = write_tiny("mnist", tmp_path, gz=True).folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    assert message("mnist", tmp_path).startswith(
        f"{path} is truncated: its gzip stream ends early;"
    )


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
        f"{path} has the magic number 0x{start.hex()}, not 0x00000801 (labels) or 0x00000803 "
        f"(images); "
        f"put an unchanged copy in its place, or remove {tiny.folder} and run `forwax data "
        f"fashion-mnist`."
    )


def test_a_missing_set_without_a_network(isolated_data):
    assert message("cifar10") == (
        "Expected cifar10 in --data-dir, FORWAX_DATA or the cache, or a network to fetch it, but "
        "found no file and got "
        "OSError from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz; connect to the "
        "network, or put its "
        "standard files into a folder cifar-10-batches-bin and give the folder above it with "
        "--data-dir or FORWAX_DATA."
    )
    assert list(isolated_data.iterdir()) == []


def test_a_refused_address_tells_its_status(monkeypatch):
    class HTTPError(OSError):
        class response:  # noqa: N801
            status_code = 404

    def answer(*_):
        raise HTTPError

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)
    assert "found no file and got HTTPError 404 from https://ossci-datasets" in message(
        "mnist"
    )


def test_a_wrong_download_is_not_kept(remote, isolated_data, serve, datafiles):
    tiny = remote("mnist")
    pages = datafiles.pages_of(tiny)
    last = list(pages)[-1]
    serve(pages | {last: b"<html>Log in first</html>"})
    mirror = MIRRORS["mnist"][0]
    assert message("mnist") == (
        f"{last} has the magic number 0x3c68746d, not 0x00000801 (labels) or 0x00000803 (images); "
        "run `forwax data` again, or give the files with FORWAX_DATA or --data-dir. Tried besides: "
        "Expected mnist in --data-dir, FORWAX_DATA or the cache, or a network to fetch it, but "
        f"found no file and got OSError from {mirror}train-images-idx3-ubyte.gz."
    )
    assert list(isolated_data.iterdir()) == []


def test_a_mirror_serves_where_the_home_gives_a_page(remote, serve, datafiles):
    tiny = remote("mnist")
    mirrored = dataclasses.replace(tiny.source, home=MIRRORS["mnist"][0])
    pages = datafiles.pages_of(dataclasses.replace(tiny, source=mirrored))
    serve(pages | dict.fromkeys(datafiles.pages_of(tiny), b"<html>Moved</html>"))
    assert len(load("mnist").train_images) == 60


def test_all_homes_that_failed_are_named(isolated_data):
    text = message("mnist")
    assert "https://ossci-datasets.s3.amazonaws.com/mnist/" in text
    assert "Tried besides: " in text
    assert "https://storage.googleapis.com/cvdf-datasets/mnist/" in text


def test_a_file_that_unpacks_to_too_much_is_refused_in_bounded_memory(
    write_tiny, tmp_path
):
    """100 MB of zeros where 47 MB are known to be the most: no more than these are unpacked."""
    tiny = write_tiny("mnist", tmp_path, gz=True)
    bomb = tiny.folder / "train-images-idx3-ubyte.gz"
    bomb.write_bytes(gzip.compress(bytes(100_000_000), 1))
    tracemalloc.start()
    text = message("mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "is another file: it unpacks to more than 47,040,016 bytes" in text
    assert peak < 1.5 * 100_000_000


def test_a_pickle_that_is_not_known_is_not_unpickled(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    called = pickle.dumps(Trap())
    for file in BATCHES:
        (folder / file).write_bytes(called)
    assert "is not unpickled" in message("cifar10", tmp_path)
    assert not Trap.sprung


class Trap:
    """Sets a flag when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return _spring, ()


def _spring():
    Trap.sprung = True


def test_a_damaged_archive(remote, isolated_data, serve, datafiles):
    ((url, packed),) = datafiles.pages_of(remote("cifar10")).items()
    serve({url: packed[: len(packed) // 2]})
    assert message("cifar10").startswith(
        f"{url} gave a truncated or damaged archive; run"
    )
    serve({url: b"<html></html>"})
    assert message("cifar10").startswith(
        f"{url} gave a truncated or damaged archive; run"
    )
    assert list(isolated_data.iterdir()) == []


def test_an_archive_without_a_file(remote, isolated_data, serve, datafiles):
    tiny = remote("cifar10")
    del tiny.contents["data_batch_4.bin"]
    serve(datafiles.pages_of(tiny))
    assert message("cifar10").startswith(
        f"{tiny.source.home} gave an archive without data_batch_4.bin; run"
    )
    assert list(isolated_data.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FORWAX_CACHE", str(tmp_path / "file"))
    text = message("mnist")
    assert text.startswith(
        f"Expected to keep mnist in the cache {tmp_path / 'file'}, but got: "
    )
    assert text.endswith("; set FORWAX_CACHE to a folder that can be written.")


def test_a_full_disk_is_not_taken_for_the_network(monkeypatch):
    def answer(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", answer)
    assert (
        "No space left on device; set FORWAX_CACHE to a folder that can be written."
        in message("mnist")
    )
