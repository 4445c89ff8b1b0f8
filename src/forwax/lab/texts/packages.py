"""Files out of packages, by the user's own package index; nothing is installed, built or run.

An index lists a package's files with their addresses (PEP 503). The archive is fetched as it is,
and one file is read from it.
"""

import ast
import html
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from forwax.lab.data import DataError
from forwax.lab.data.sets import Source
from forwax.lab.data.store import REMEDY, download
from forwax.lab.report import Json

SECTIONS = ("download.", "global.")
"""Where pip's files may hold an option, the stronger first."""

FAULTS = (
    LookupError,
    OSError,
    EOFError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged archive raises."""


def contents(source: Source, folder: Path) -> Iterator[tuple[str, bytes, str]]:
    """The one file of a set, out of the archive that its `home` names.

    Args:
        source: the set; its home is an archive's name, a space, and the file's path in it, of which
            each further archive on the way is one more word.
        folder: where archives are kept meanwhile.

    Raises:
        DataError: where no index lists the archive, and for a damaged one.
    """
    archive, *inner = source.home.split()
    url, options = find(source, archive, folder)
    packed = download(source, url, folder / archive, **options).read_bytes()
    where = archive
    try:
        for name in inner:
            packed = member(packed, name)
            where = f"{name} of {where}"
    except FAULTS as error:
        reason = str(error).partition("\n")[0].rstrip(":.")
        raise DataError(
            f"{archive} is truncated, damaged or another one: {reason}; {REMEDY}."
        ) from error
    (file,) = source.checksums
    yield file, packed, where


def member(packed: bytes, name: str) -> bytes:
    """The content of the file of a name, in whatever folder of a tar or zip archive.

    Raises:
        LookupError: when there is none.

    >>> stream = io.BytesIO()
    >>> with zipfile.ZipFile(stream, "w") as archive:
    ...     archive.writestr("deep/a.txt", "found")
    >>> member(stream.getvalue(), "a.txt")
    b'found'
    """
    stream = io.BytesIO(packed)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            for path in archive.namelist():
                if PurePosixPath(path).name == name:
                    return archive.read(path)
        raise LookupError(f"it holds no {name}")
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        for each in archive:
            if each.isfile() and PurePosixPath(each.name).name == name:
                file = archive.extractfile(each)
                assert file is not None
                return file.read()
    raise LookupError(f"it holds no {name}")


def find(source: Source, archive: str, folder: Path) -> tuple[str, Json]:
    """The address of an archive, and what a request to its index takes.

    Raises:
        DataError: when no index can be asked, or none lists it.
    """
    settings = configuration()
    # an archive's name is its package's, a hyphen and the version
    package = re.sub(r"[-_.]+", "-", archive.split("-")[0]).lower()
    listing = folder / "listing.html"
    fault: DataError | None = None
    for index in indexes(settings):
        address, options = _request(f"{index.rstrip('/')}/{package}/", settings)
        try:
            page = download(source, address, listing, **options).read_text("utf-8")
        except DataError as error:
            fault = fault or error
            continue
        for link in re.findall(r"href\s*=\s*[\"']([^\"']+)", page):
            url = urljoin(address, html.unescape(link)).partition("#")[0]
            if unquote(urlsplit(url).path).rpartition("/")[2] == archive:
                same = urlsplit(url).netloc == urlsplit(address).netloc
                return url, options if same else _request(url, settings)[1]
    raise fault or DataError(
        f"Expected {archive} on the package index, but none of its lists names it; see `pip config "
        f"list`, or {REMEDY}."
    )


def _request(url: str, settings: dict[str, str]) -> tuple[str, Json]:
    """An address without a user's name and password, and these as options of a request."""
    parts = urlsplit(url)
    options: Json = {"verify": settings["cert"]} if "cert" in settings else {}
    if parts.username:
        options["auth"] = unquote(parts.username), unquote(parts.password or "")
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl(), options


def indexes(settings: dict[str, str]) -> list[str]:
    """The addresses of the user's package indexes, the main one first.

    Args:
        settings: see `configuration`.

    Raises:
        DataError: when none is known.

    >>> indexes({"index-url": "http://a/simple", "extra-index-url": "http://b file:///c"})
    ['http://a/simple', 'http://b']
    """
    main = settings.get("index-url") or _built_in()
    found = [main, *settings.get("extra-index-url", "").split()]
    return [url for url in found if url.startswith("http")]


def configuration() -> dict[str, str]:
    """Pip's options of the environment, then of its files; without pip those of the environment."""
    found = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    }
    lines = [line.partition("=") for line in _pip("config", "list").splitlines()]
    for section in SECTIONS:
        for name, _, value in lines:
            if name.startswith(section):
                option: Any = ast.literal_eval(value)
                found.setdefault(name.removeprefix(section), str(option))
    return found


def _built_in() -> str:
    """The index that pip itself takes, which its help names."""
    told = re.search(
        r"--index-url <url>.*?\(default (\S+)\)", _pip("download", "--help")
    )
    if told is None:
        raise DataError(
            "Expected pip beside this Python, which knows the package index, but it says none; "
            f"install pip, or set PIP_INDEX_URL, or {REMEDY}."
        )
    return told[1]


def _pip(*words: str) -> str:
    """What a command of pip prints; nothing where it fails."""
    command = [sys.executable, "-m", "pip", *words]
    # its help breaks lines at the terminal's width
    env = os.environ | {"COLUMNS": "9999"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    return done.stdout
