"""Write tiny data sets in the standard formats.

Tests reach this through the fixtures of conftest.py.
"""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forwax.lab.data.sets import SOURCES, Source


@dataclass(frozen=True, eq=False)
class Tiny:
    """One written set, and the arrays that loading it must give."""

    source: Source
    folder: Path
    contents: dict[str, bytes]
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in values.shape
    )
    return header + values.astype(np.uint8).tobytes()


def cifar(images: np.ndarray, labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels.astype(np.uint8)[:, None], planes], axis=1).tobytes()


def make_split(
    size: int, shape: tuple[int, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright row at each label's height, so that a model can learn it."""
    labels = np.arange(size, dtype=np.int32) % 10
    images = np.random.default_rng(seed).integers(
        0, 100, (size, *shape), dtype=np.uint8
    )
    images[np.arange(size), 2 * labels + 1] = 255
    return images, labels


def write(
    name: str, root: Path, *, gz: bool = False, train: int = 60, test: int = 20
) -> Tiny:
    """Write a set of `train` and `test` images under root; cifar10 has five equal batches."""
    source = SOURCES[name]
    shape = (32, 32, 3) if name == "cifar10" else (28, 28, 1)
    splits = {"train": make_split(train, shape, 0), "test": make_split(test, shape, 1)}
    contents = dict(_encode(source, splits))
    folder = root / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / f"{file}{'.gz' * gz}").write_bytes(
            gzip.compress(content, mtime=0) if gz else content
        )
    md5s = {
        file: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for file, content in contents.items()
    }
    images = {split: pair[0] for split, pair in splits.items()}
    labels = {split: pair[1] for split, pair in splits.items()}
    return Tiny(replace(source, checksums=md5s), folder, contents, images, labels)


def _encode(
    source: Source, splits: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[str, bytes]]:
    for split, files in (("train", source.train), ("test", source.test)):
        images, labels = splits[split]
        if source.name != "cifar10":
            yield from zip(files, (idx(images[..., 0]), idx(labels)), strict=True)
            continue
        for file, some, their in zip(
            files,
            np.split(images, len(files)),
            np.split(labels, len(files)),
            strict=True,
        ):
            yield file, cifar(some, their)


def pages_of(tiny: Tiny) -> dict[str, bytes]:
    """What a set's public home serves."""
    if not tiny.source.archive:
        return {
            f"{tiny.source.home}{file}.gz": gzip.compress(content)
            for file, content in tiny.contents.items()
        }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file, content in {"readme.html": b"hello", **tiny.contents}.items():
            member = tarfile.TarInfo(f"{tiny.source.folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return {tiny.source.home: packed.getvalue()}
