"""Where a set's files lie, and reading them: never without their checksum."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pooch

from forwax.lab.data.dataset import DataError
from forwax.lab.data.formats import decompress
from forwax.lab.data.sources import Source


def cache_dir() -> Path:
    """The folder for fetched sets: ``FORWAX_CACHE``, or the platform's cache folder.

    Example:
        ```sh
        FORWAX_CACHE=~/sets forwax data mnist   # keeps the set in ~/sets/mnist
        ```
    """
    return Path(os.environ.get("FORWAX_CACHE") or pooch.os_cache("forwax")).expanduser()


def search_path(data_dir: Path | None = None) -> Iterator[Path]:
    """The folders that may hold sets, in the order of looking: ``data_dir``, ``FORWAX_DATA``, the cache.

    Args:
        data_dir: a folder given by the user.

    Yields:
        Each folder; the user's own exist, the cache may not yet.

    Raises:
        DataError: if a folder that the user gave does not exist.

    Example:
        >>> from pathlib import Path
        >>> next(search_path(Path.cwd())) == Path.cwd()
        True
    """
    for given, origin in (
        (data_dir, "--data-dir"),
        (os.environ.get("FORWAX_DATA"), "FORWAX_DATA"),
    ):
        if not given:
            continue
        root = Path(given).expanduser()
        if not root.is_dir():
            raise DataError(
                f"Expected a folder of data sets at {root} ({origin}), but there is none; correct "
                f"the path."
            )
        yield root
    yield cache_dir()


def find_file(folder: Path, file: str) -> Path | None:
    """The file in this folder, plain or with ``.gz``, or None.

    Example:
        >>> from pathlib import Path
        >>> find_file(Path("no-such-folder"), "train-images-idx3-ubyte") is None
        True
    """
    return next(
        (path for path in (folder / file, folder / f"{file}.gz") if path.is_file()),
        None,
    )


def locate(source: Source, data_dir: Path | None = None) -> Path | None:
    """The first folder that holds all of a set's files, or None; nothing is read.

    Args:
        source: the set.
        data_dir: a folder given by the user, looked at first.

    Raises:
        DataError: if a folder holds some of the files only, or one that the user gave does not
            exist.

    Example:
        ```sh
        FORWAX_DATA=~/data forwax data mnist   # looks into ~/data/mnist
        ```
    """
    for root in search_path(data_dir):
        folder = root / source.folder
        missing = [file for file in source.checksums if find_file(folder, file) is None]
        if not missing:
            return folder
        if len(missing) < len(source.checksums):
            raise DataError(
                f"Expected all {len(source.checksums)} files of {source.name} in {folder}, but "
                f"without "
                f"{', '.join(missing)}; add what is missing, or remove the folder."
            )
    return None


def read_content(source: Source, folder: Path, file: str) -> bytes:
    """The decompressed and verified content of one file that ``locate`` found.

    Args:
        source: the set.
        folder: where its files are.
        file: the standard name, without ``.gz``.

    Raises:
        DataError: if the file is truncated, damaged, or not the expected one.
    """
    path = find_file(folder, file)
    if path is None:
        raise DataError(
            f"Expected {file} of {source.name} in {folder}, but it is gone; run `forwax data` "
            f"again."
        )
    remedy = (
        f"put an unchanged copy in its place, or remove {folder} and run `forwax "
        f"data "
        f"{source.name}`"
    )
    return verified(source, file, path.read_bytes(), where=str(path), remedy=remedy)


def verified(source: Source, file: str, packed: bytes, where: str, remedy: str) -> bytes:
    """Unpack content and check its md5.

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
    try:
        content = decompress(packed)
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != source.checksums[file]:
            source.decode(content)  # a fault of the format says more than a checksum
            raise ValueError(
                f"should have md5 {source.checksums[file]} once decompressed, but has {digest}"
            )
    except ValueError as error:
        raise DataError(f"{where} {error}; {remedy}.") from None
    return content
