"""The bytes of a ledger: a header, a digest and rows, each with a checksum; read without trust."""

import hashlib
import json
import math
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps a second writer off
    fcntl = None

MAGIC = b"FORWAXLG"
FORMAT = 1

_START = struct.Struct("<8sIQ")  # magic, number of the format, bytes of the JSON text
_CRC = struct.Struct("<I")
_MOST = 1 << 26
"""A header of more bytes is none of ours."""

_DIGEST = hashlib.sha256().digest_size
UNKNOWN = bytes(_DIGEST)
"""In place of a digest where slopes do not say of what parameters they are."""


class RowFile:
    """An open ledger, as bytes.

    Attributes:
        path: the file.
        header: what its JSON text says.
        digest: of the form of the parameters, 32 bytes; None before the first row.
        rows: those that are whole.
        dtype: of a row: step, rate, weights, checksum.
    """

    def __init__(self, path: str, descriptor: int, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.digest: bytes | None = None
        self.dtype = _row_dtype(header, path)
        self.rows = np.zeros(0, self.dtype)
        self._descriptor: int | None = descriptor
        self._start = len(_encoded(header))
        self._is_writer = False
        self._good = self._start

    @classmethod
    def create(cls, path: str, header: dict[str, Any]) -> "RowFile":
        """A new file; one that exists is left alone.

        Raises:
            FileExistsError: when the path exists.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileExistsError:
            raise FileExistsError(
                f"Ledger.create: expected a path where nothing is, got {path}, which exists. Go on "
                "with forwax.Ledger.open(path), or choose another one."
            ) from None
        file = cls(path, descriptor, header)
        file.lock()
        file._write(_encoded(header))
        file.sync()
        return file

    @classmethod
    def open(cls, path: str) -> "RowFile":
        """A file that exists, to read; the first row that is written makes it a writer's.

        Raises:
            ValueError: when it is no ledger, or its header is damaged.
        """
        flags = getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(path, os.O_RDWR | flags)
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY | flags)
        try:
            file = cls(path, descriptor, _read_header(path, descriptor))
            file.load()
        except BaseException:
            os.close(descriptor)
            raise
        return file

    def load(self) -> None:
        """Read digest and rows; what is cut or damaged at the end is dropped with a warning."""
        descriptor = self._open_descriptor()
        size = os.fstat(descriptor).st_size
        os.lseek(descriptor, self._start, os.SEEK_SET)
        data = _read(descriptor, size - self._start)
        block = _DIGEST + _CRC.size
        self.digest = None
        self.rows = np.zeros(0, self.dtype)
        self._good = self._start
        if len(data) < block:
            if data:
                self._warn("the digest behind the header is cut, and nothing follows")
            return
        digest = data[:_DIGEST]
        if _CRC.pack(zlib.crc32(digest)) != data[_DIGEST:block]:
            raise ValueError(
                f"Ledger.open: {self.path} is damaged: the digest behind its header has another "
                "checksum. Take a copy of the file, or start a new one."
            )
        self.digest = digest
        width = self.dtype.itemsize
        count, rest = divmod(len(data) - block, width)
        self.rows = np.frombuffer(data, self.dtype, count, offset=block)
        if count and not rest and not self.is_good(count - 1):
            # As a crash of the machine leaves it, whose file system kept the length alone.
            count -= 1
            rest = width
        self.rows = self.rows[:count]
        self._good = self._start + block + count * width
        if rest:
            self._warn(f"row {count}, the last one, is cut or damaged")

    def is_good(self, number: int) -> bool:
        """Whether a row has its checksum."""
        row = self.rows[number]
        return int(row["crc"]) == _checksum(row, number)

    def write(self, digest: bytes, rows: np.ndarray) -> None:
        """Append rows, in one piece; the first ones behind the digest.

        What was cut at the end is overwritten.
        """
        self.lock()
        first = len(self.rows)
        data = b""
        if self.digest is None:
            data = digest + _CRC.pack(zlib.crc32(digest))
        for i, row in enumerate(rows):
            rows["crc"][i] = _checksum(row, first + i)
        self._write(data + rows.tobytes())
        self.digest = self.digest or digest
        self.rows = np.concatenate([self.rows, rows])

    def lock(self) -> None:
        """Keep other writers off, and see what they have written before.

        Raises:
            BlockingIOError: when another one writes.
        """
        if self._is_writer:
            return
        descriptor = self._open_descriptor()
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"Ledger: expected to be the only writer of {self.path}, but another one has "
                    "it open. Close that one, or write to another file."
                ) from None
        self._is_writer = True
        count = len(self.rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was said when the file was opened
            if os.fstat(descriptor).st_size > self._start:
                self.load()
        if len(self.rows) != count:
            raise RuntimeError(
                f"Ledger: {self.path} had {count} rows when it was opened, and has "
                f"{len(self.rows)} now: another writer went on. Open it again."
            )

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._open_descriptor())

    def close(self) -> None:
        """Close the file; again is no error."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, data: bytes) -> None:
        descriptor = self._open_descriptor()
        start = self._good if os.fstat(descriptor).st_size else 0
        os.ftruncate(descriptor, start)
        os.lseek(descriptor, start, os.SEEK_SET)
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, start)
            raise OSError(
                f"Ledger: {self.path} takes no more bytes; nothing was written."
            )
        self._good = start + len(data)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError(
                f"Ledger: {self.path} is closed. Open it with forwax.Ledger.open(path)."
            )
        return self._descriptor

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"Ledger.open: {self.path}: {what}. It is dropped, and overwritten by the next append.",
            stacklevel=5,
        )


def digest_of(lines: Sequence[str]) -> bytes:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).digest()


def _row_dtype(header: dict[str, Any], path: str) -> np.dtype:
    counts: list[Any] = [header.get(name) for name in ("num_keys", "num_tangents")]
    counts.append(header.get("num_examples") or 1)
    if not all(isinstance(count, int) and 0 < count < 1 << 31 for count in counts):
        raise ValueError(
            f"Ledger.open: {path} has a header without counts of keys, tangents and examples."
        )
    size = math.prod(counts)
    if size > _MOST:
        raise ValueError(
            f"Ledger.open: {path} says that a row has {size:,} numbers, more than {_MOST:,}."
        )
    return np.dtype(
        [("step", "<u4"), ("rate", "<f4"), ("weights", "<f4", (size,)), ("crc", "<u4")]
    )


def _checksum(row: Any, number: int) -> int:
    """CRC-32 of a row that starts from its number, so that rows cannot change places."""
    return zlib.crc32(row.tobytes()[: -_CRC.size], number & 0xFFFFFFFF)


def _encoded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    start = _START.pack(MAGIC, FORMAT, len(text)) + text
    return start + _CRC.pack(zlib.crc32(start))


def _read_header(path: str, descriptor: int) -> dict[str, Any]:
    """The JSON text of a header, of which no length is believed."""
    size = os.fstat(descriptor).st_size
    start = _read(descriptor, min(size, _START.size))
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise ValueError(f"Ledger.open: {path} is no ledger of forwax.")
    _, number, length = _START.unpack(start)
    if number != FORMAT:
        raise ValueError(
            f"Ledger.open: expected format {FORMAT}, got {number} in {path}: the file is damaged, "
            "or another version of forwax wrote it."
        )
    if length > min(_MOST, size - _START.size - _CRC.size):
        raise ValueError(
            f"Ledger.open: {path} is damaged: its header is said to have {length:,} bytes, and the "
            f"file has {size:,}."
        )
    text = _read(descriptor, length)
    crc = _read(descriptor, _CRC.size)
    if _CRC.pack(zlib.crc32(start + text)) != crc:
        raise ValueError(
            f"Ledger.open: {path} is damaged: its header has another checksum. Take a copy of the "
            "file."
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    # Written as it was read, byte for byte: rows begin where it ends.
    if not isinstance(header, dict) or _encoded(header) != start + text + crc:
        raise ValueError(
            f"Ledger.open: {path} has a header that forwax has not written."
        )
    return header


def _read(descriptor: int, count: int) -> bytes:
    """So many bytes, or those that there are."""
    parts: list[bytes] = []
    while count > 0:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
