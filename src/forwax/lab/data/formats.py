"""The standard file formats, from bytes to arrays: IDX and CIFAR-10's binary records.

IDX (MNIST, Fashion-MNIST): two zero bytes, a type code (8 is uint8), the number of dimensions, each
size as a big-endian uint32, then the values. CIFAR-10: records of one label byte and 3,072 pixels,
the red plane first, then green, then blue. A ValueError says in a few words what is wrong with the
bytes; the caller knows which file it was.
"""

import gzip
import io
import math
import zlib

import numpy as np

GZIP_MAGIC = b"\x1f\x8b"
IDX_MAGIC = (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03")
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + math.prod(CIFAR_SHAPE)


def decompress(content: bytes, largest: int | None = None) -> bytes:
    """Unpack gzip content; anything else is returned as it is.

    The content decides, not the file's name: some servers unpack a ``.gz`` on the way.

    Args:
        content: the bytes of a file.
        largest: how many bytes may come out of it.

    Raises:
        ValueError: if the gzip stream ends early, is damaged, or holds more.

    Example:
        >>> import gzip
        >>> decompress(gzip.compress(b"abc")), decompress(b"abc")
        (b'abc', b'abc')
    """
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            unpacked = stream.read(-1 if largest is None else largest + 1)
    except EOFError:
        raise ValueError("is truncated: its gzip stream ends early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"is damaged: its gzip stream cannot be unpacked ({error})"
        ) from None
    if largest is not None and len(unpacked) > largest:
        raise ValueError(f"is another file: it unpacks to more than {largest:,} bytes")
    return unpacked


def decode_idx(content: bytes) -> tuple[np.ndarray, ...]:
    """Decode an IDX file of uint8 values.

    Args:
        content: the decompressed bytes of the file.

    Returns:
        One array: uint8 [N, height, width, 1] for three dimensions, int32 [N] for one.

    Raises:
        ValueError: if the magic number is wrong, or the length differs from what the header says.

    Example:
        >>> (labels,) = decode_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        >>> labels
        array([7, 2, 1], dtype=int32)
    """
    magic = content[:4]
    if len(magic) == 4 and magic not in IDX_MAGIC:
        raise ValueError(
            f"has the magic number 0x{magic.hex()}, not 0x00000801 (labels) or 0x00000803 (images)"
        )
    header = 4 + 4 * (magic[3] if len(magic) == 4 else 1)
    if len(content) < header:
        raise ValueError(
            f"is truncated: its header takes {header} bytes, but it holds {len(content)}"
        )
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    _check_length(content, header + math.prod(shape), "by its header")
    values = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return (values[..., None],) if len(shape) == 3 else (values.astype(np.int32),)


def decode_cifar(content: bytes) -> tuple[np.ndarray, ...]:
    """Decode a CIFAR-10 binary batch.

    Args:
        content: the decompressed bytes of the file.

    Returns:
        The images, uint8 [N, 32, 32, 3] in the order red, green, blue, and the labels, int32 [N].

    Raises:
        ValueError: if the length is not a whole number of records.

    Example:
        >>> red = bytes([9]) + bytes([255] * 1024) + bytes(2048)
        >>> images, labels = decode_cifar(red)
        >>> images.shape, images[0, 0, 0].tolist(), labels.tolist()
        ((1, 32, 32, 3), [255, 0, 0], [9])
    """
    _check_length(
        content,
        math.ceil(len(content) / CIFAR_RECORD) * CIFAR_RECORD,
        f"in records of {CIFAR_RECORD}",
    )
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    return np.ascontiguousarray(
        records[:, 1:].reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1)
    ), records[:, 0].astype(np.int32)


def _check_length(content: bytes, expected: int, why: str) -> None:
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "too long"
        raise ValueError(
            f"is {fault}: it should hold {expected} bytes {why}, but it holds {len(content)}"
        )
