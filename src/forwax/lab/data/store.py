"""Where sets are kept: looked up, fetched whole or not at all, never read without their checksum.

A fetched set is downloaded, unpacked and verified in a hidden folder beside the final one, and one
rename publishes it. A crash, a kill or a second process at any moment leaves either no set or a
complete one.
"""

import contextlib
import gzip
import hashlib
import os
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pooch

from forwax.lab.data.elsewhere import forms, homes
from forwax.lab.data.formats import decompress
from forwax.lab.data.sets import DataSet, Source, find_source, load_digits
from forwax.lab.flags import DataError

STAGING_PREFIX = ".fetching-"
Contents = Callable[[Source, Path], Iterator[tuple[str, bytes, str]]]
"""From a set and a folder for archives to each file's name, content and address."""

STALE_SECONDS = 24 * 3600
REMEDY = "run `forwax data` again, or give the files with FORWAX_DATA or --data-dir"


def load(name: str, data_dir: Path | None = None) -> DataSet:
    """Load a data set, and fetch it first where no folder holds it.

    Looks into ``data_dir``, then ``FORWAX_DATA``, then the cache (``FORWAX_CACHE``, or the
    platform's cache folder), for the standard file names in ``mnist/``, ``fashion-mnist/`` or
    ``cifar-10-batches-bin/``, with or without ``.gz``; or as torchvision keeps them, in
    ``MNIST/raw/``, ``FashionMNIST/raw/`` or ``cifar-10-batches-py/``. What none of them holds is
    fetched from its public home into the cache. The md5 of every file's decompressed content is
    checked at every load.

    Args:
        name: ``digits``, ``mnist``, ``fashion-mnist`` or ``cifar10``.
        data_dir: a folder to look into first.

    Returns:
        The set, images in uint8 and labels in int32.

    Raises:
        DataError: for an unknown name, a wrong, truncated or missing file, or a set that cannot be
            fetched.

    Example:
        >>> data = load("digits")
        >>> data.train_images.shape, data.train_images.dtype, data.num_classes
        ((1437, 8, 8, 1), dtype('uint8'), 10)
    """
    if name == "digits":
        return load_digits()
    source = find_source(name)
    found = find(source, data_dir)
    source, folder = found or (source, fetch(source, cache_dir()))
    return DataSet(
        name,
        *_read_split(source, folder, source.train),
        *_read_split(source, folder, source.test),
        num_classes=len(source.class_names),
        class_names=source.class_names,
        scale=255,
    )


def cache_dir() -> Path:
    """The folder for fetched sets: ``FORWAX_CACHE``, or the platform's cache folder.

    Example:
        ```sh
        FORWAX_CACHE=~/sets forwax data mnist   # keeps the set in ~/sets/mnist
        ```
    """
    return Path(os.environ.get("FORWAX_CACHE") or pooch.os_cache("forwax")).expanduser()


def locate(source: Source, data_dir: Path | None = None) -> Path | None:
    """The folder that `find` finds, or None.

    Example:
        ```sh
        FORWAX_DATA=~/data forwax data mnist   # looks into ~/data/mnist
        ```
    """
    found = find(source, data_dir)
    return found and found[1]


def find(source: Source, data_dir: Path | None = None) -> tuple[Source, Path] | None:
    """The first folder that holds all of a set's files and their form; nothing is read.

    Args:
        source: the set.
        data_dir: a folder given by the user, looked at first.

    Raises:
        DataError: if a folder holds some of the files only, or one that the user gave does not
            exist.
    """
    for root in _search_path(data_dir):
        for kept in forms(source):
            folder = root / kept.folder
            missing = _missing(kept, folder)
            if not missing:
                return kept, folder
            if len(missing) < len(kept.checksums):
                raise DataError(
                    f"Expected all {len(kept.checksums)} files of {kept.name} in {folder}, but "
                    f"without {', '.join(missing)}; add what is missing, or remove the folder."
                )
    return None


def _search_path(data_dir: Path | None) -> Iterator[Path]:
    """The folders that may hold sets; the user's own must exist, the cache may not yet."""
    given = {"--data-dir": data_dir, "FORWAX_DATA": os.environ.get("FORWAX_DATA")}
    for origin, path in given.items():
        if not path:
            continue
        root = Path(path).expanduser()
        if not root.is_dir():
            raise DataError(
                f"Expected a folder of data sets at {root} ({origin}), but there is none; correct "
                "the path."
            )
        yield root
    yield cache_dir()


def _missing(source: Source, folder: Path) -> list[str]:
    """The files of a set that a folder lacks."""
    return [file for file in source.checksums if _find_file(folder, file) is None]


def _find_file(folder: Path, file: str) -> Path | None:
    """The file in this folder, plain or with ``.gz``, or None."""
    return next(filter(Path.is_file, (folder / file, folder / f"{file}.gz")), None)


def _read_split(
    source: Source, folder: Path, files: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The images and the labels of all files."""
    arrays = [
        array for file in files for array in source.decode(read(source, folder, file))
    ]
    return np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])


def read(source: Source, folder: Path, file: str) -> bytes:
    """The decompressed and verified content of a file that ``locate`` found."""
    path = _find_file(folder, file)
    if path is None:
        raise DataError(
            f"Expected {file} of {source.name} in {folder}, but it is gone; run `forwax data` "
            "again."
        )
    remedy = (
        f"put an unchanged copy in its place, or remove {folder} and run `forwax data "
        f"{source.name}`"
    )
    return _verified(source, file, path.read_bytes(), str(path), remedy)


def _verified(
    source: Source, file: str, packed: bytes, where: str, remedy: str
) -> bytes:
    """Unpack content and check its checksum.

    Args:
        source: the set.
        file: which of its files this is, by its standard name.
        packed: the content, gzip or plain.
        where: the path or address that it came from, for the error.
        remedy: what to do, for the error.

    Returns:
        The decompressed content.

    Raises:
        DataError: if the content is truncated, damaged, or not the expected one.
    """
    expected = source.checksums[file]
    try:
        content = decompress(packed, source.largest)
        digest = hashlib.new(source.hash, content, usedforsecurity=False).hexdigest()
        if digest != expected:
            source.decode(content)  # a fault of the format says more than a checksum
            raise ValueError(
                f"should have {source.hash} {expected} once decompressed, but has {digest}"
            )
    except ValueError as error:
        raise DataError(f"{where} {error}; {remedy}.") from None
    return content


def fetch(source: Source, cache: Path, contents: Contents | None = None) -> Path:
    """Fetch a set into the cache.

    Args:
        source: the set.
        cache: the cache folder, made if need be.
        contents: gives the files, by default from the set's home; see `_contents`.

    Returns:
        The folder that holds the set's files, decompressed.

    Raises:
        DataError: without a network, for content that fails its checksum, or a cache that cannot be
            written.

    Example:
        ```sh
        FORWAX_CACHE=~/sets forwax data fashion-mnist
        ```
    """
    final = cache / source.folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        faults: list[DataError] = []
        for at_home in homes(source):
            try:
                _fetch(at_home, final, contents or _contents)
            except DataError as fault:
                faults.append(fault)
            else:
                return final
    except OSError as error:
        raise DataError(
            f"Expected to keep {source.name} in the cache {cache}, but got: {error}; "
            "set FORWAX_CACHE to a folder that can be written."
        ) from error
    first, *others = faults
    if not others:
        raise first
    tried = "; ".join(str(fault).partition("; ")[0] for fault in others)
    raise DataError(f"{first} Tried besides: {tried}.") from first


def _fetch(source: Source, final: Path, contents: Contents) -> None:
    """Fetch a set from its home, and publish it as a whole."""
    with tempfile.TemporaryDirectory(
        prefix=STAGING_PREFIX, dir=final.parent, ignore_cleanup_errors=True
    ) as staging:
        staged = Path(staging) / source.folder
        staged.mkdir()
        for file, packed, where in contents(source, Path(staging)):
            (staged / file).write_bytes(_verified(source, file, packed, where, REMEDY))
        missing = ", ".join(sorted(_missing(source, staged)))
        if missing:
            raise DataError(
                f"{source.home} gave an archive without {missing}; {REMEDY}."
            )
        try:
            os.replace(staged, final)
        except OSError:
            # if another process was quicker, its set stays
            if _missing(source, final):
                raise


def _sweep(cache: Path) -> None:
    """Remove what killed fetches left a day ago or earlier; younger ones may still be at work."""
    for folder in cache.glob(f"{STAGING_PREFIX}*"):
        with contextlib.suppress(
            FileNotFoundError
        ):  # another process may sweep at the same time
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                rmtree(folder, ignore_errors=True)


def _contents(source: Source, folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """Each file with its content as it came and its address, fetched as it is asked for."""
    if not source.archive:
        for file in source.checksums:
            url = f"{source.home}{file}.gz"
            yield file, download(source, url, folder / f"{file}.gz").read_bytes(), url
        return
    packed = download(source, source.home, folder / Path(source.home).name)
    try:
        with tarfile.open(packed) as archive:
            for member in archive:
                # nothing else in the archive is touched
                file = member.name.removeprefix(f"{source.folder}/")
                stream = (
                    archive.extractfile(member) if file in source.checksums else None
                )
                if stream is not None:
                    yield file, stream.read(), f"{file} of {source.home}"
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{source.home} gave a truncated or damaged archive; {REMEDY}."
        ) from error


def download(source: Source, url: str, target: Path, **options: Any) -> Path:
    """Download one file, with a progress bar on standard error when that is a terminal.

    Args:
        source: the set, for the error.
        url: the file's address.
        target: where it is written.
        options: what else the request takes, such as a certificate.

    Raises:
        DataError: when the network fails.
    """
    fetch_to = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=30, **options
    )
    try:
        fetch_to(url, str(target), None)
    except OSError as error:
        # the disk's own errors carry a number, the network library's none
        if error.errno is not None:
            raise
        # of the network's, class and HTTP status: their texts nest several others
        status = getattr(getattr(error, "response", None), "status_code", "")
        kind = f"{type(error).__name__} {status}".rstrip()
        raise DataError(
            f"Expected {source.name} in --data-dir, FORWAX_DATA or the cache, or a network to "
            f"fetch it, but found no file and got {kind} from {url}; connect to the "
            f"network, or put its standard files into a folder {source.folder} and give the "
            "folder above it with --data-dir or FORWAX_DATA."
        ) from error
    return target
