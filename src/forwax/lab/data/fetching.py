"""Fetch a set from its public home into the cache, whole or not at all.

Everything is downloaded, unpacked and verified in a hidden folder beside the final one, and one
rename publishes the set. A crash, a kill or a second process at any moment leaves either no set or
a complete one.
"""

import contextlib
import gzip
import os
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pooch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from forwax.lab.data.dataset import DataError
from forwax.lab.data.files import find_file, verified
from forwax.lab.data.sources import Source

STAGING_PREFIX = ".fetching-"
STALE_SECONDS = 24 * 3600
REMEDY = "run `forwax data` again, or give the files with FORWAX_DATA or --data-dir"


class _Bar:
    """A rich progress bar in the shape that pooch's downloader drives."""

    def __init__(self, progress: Progress, label: str):
        self._progress = progress
        self._task = progress.add_task(label, total=None)

    @property
    def total(self) -> float | None:
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None)  # a server may not tell the size

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop_task(self._task)


def download(url: str, target: Path) -> None:
    """Download one file, with a progress bar on standard error when that is a terminal.

    Args:
        url: an http or https address.
        target: the file to write.

    Raises:
        OSError: without a network, for a refused address, or when the disk is full.

    Example:
        ```sh
        forwax data mnist
        ```
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
    ) as progress:
        bar = _Bar(progress, target.name)
        # pooch takes any bar of this shape, but its types say bool
        fetch_to = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=30)  # pyright: ignore[reportArgumentType]
        fetch_to(url, str(target), None)


def fetch(source: Source, cache: Path) -> Path:
    """Fetch a set into the cache.

    Args:
        source: the set.
        cache: the cache folder, made if need be.

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
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        with tempfile.TemporaryDirectory(
            prefix=STAGING_PREFIX, dir=cache, ignore_cleanup_errors=True
        ) as staging:
            staged = Path(staging) / source.folder
            staged.mkdir()
            contents = _archive_contents if source.archive else _file_contents
            for file, content in contents(source, Path(staging)):
                (staged / file).write_bytes(content)
            return _publish(source, staged, cache / source.folder)
    except OSError as error:
        raise DataError(
            f"Expected to keep {source.name} in the cache {cache}, but got: {error}; "
            "set FORWAX_CACHE to a folder that can be written."
        ) from error


def _download(source: Source, url: str, target: Path) -> None:
    try:
        download(url, target)
    except OSError as error:
        if (
            error.errno is not None
        ):  # the disk's own errors carry a number, the network library's none
            raise
        raise DataError(
            f"Expected {source.name} in --data-dir, FORWAX_DATA or the cache, or a network to "
            f"fetch it, but found no "
            f"file and got {_kind(error)} from {url}; connect to the network, or put its standard "
            f"files into a folder "
            f"{source.folder} and give the folder above it with --data-dir or FORWAX_DATA."
        ) from error


def _kind(error: OSError) -> str:
    """An error's class and HTTP status, if any: a network library's texts nest several others."""
    status = getattr(getattr(error, "response", None), "status_code", "")
    return f"{type(error).__name__} {status}".rstrip()


def _file_contents(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Download each file in turn and verify it, so that a wrong one stops the rest."""
    for file in source.checksums:
        url, packed = f"{source.home}{file}.gz", folder / f"{file}.gz"
        _download(source, url, packed)
        yield (
            file,
            verified(source, file, packed.read_bytes(), where=url, remedy=REMEDY),
        )


def _archive_contents(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Download the archive and read its members by name; nothing else in it is touched."""
    packed = folder / Path(source.home).name
    _download(source, source.home, packed)
    missing = set(source.checksums)
    try:
        with tarfile.open(packed) as archive:
            for member in archive:
                file = member.name.removeprefix(f"{source.folder}/")
                stream = archive.extractfile(member) if file in missing else None
                if stream is not None:
                    missing.discard(file)
                    yield (
                        file,
                        verified(
                            source,
                            file,
                            stream.read(),
                            where=f"{file} of {source.home}",
                            remedy=REMEDY,
                        ),
                    )
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source.home} gave a truncated or damaged archive; {REMEDY}.") from error
    if missing:
        raise DataError(
            f"{source.home} gave an archive without {', '.join(sorted(missing))}; {REMEDY}."
        )


def _publish(source: Source, staged: Path, final: Path) -> Path:
    """Give the complete folder its name; if another process was quicker, keep that one's."""
    try:
        os.replace(staged, final)
    except OSError:
        if any(find_file(final, file) is None for file in source.checksums):
            raise
    return final


def _sweep(cache: Path) -> None:
    """Remove what killed fetches left a day ago or earlier; younger ones may still be at work."""
    for folder in cache.glob(f"{STAGING_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may sweep at the same time
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                rmtree(folder, ignore_errors=True)
