"""A data set by its name: from the user's folder, the cache, or its public home."""

from pathlib import Path

import numpy as np

from forwax.lab.data.dataset import DataSet
from forwax.lab.data.digits import load_digits
from forwax.lab.data.fetching import fetch
from forwax.lab.data.files import cache_dir, locate, read_content
from forwax.lab.data.sources import Source, find_source


def load(name: str, data_dir: Path | None = None) -> DataSet:
    """Load a data set, and fetch it first where no folder holds it.

    Looks into ``data_dir``, then ``FORWAX_DATA``, then the cache (``FORWAX_CACHE``, or the
    platform's cache folder), for the standard file names in ``mnist/``, ``fashion-mnist/`` or
    ``cifar-10-batches-bin/``, with or without ``.gz``. What none of them holds is fetched from its
    public home into the cache. The md5 of every file's decompressed content is checked at every
    load.

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
    folder = locate(source, data_dir) or fetch(source, cache_dir())
    return _read(source, folder)


def _read(source: Source, folder: Path) -> DataSet:
    train_images, train_labels = _read_split(source, folder, source.train)
    test_images, test_labels = _read_split(source, folder, source.test)
    return DataSet(
        name=source.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        scale=255,
    )


def _read_split(
    source: Source, folder: Path, parts: tuple[tuple[str, ...], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Each part's files give images, then labels; the parts follow one another."""
    decoded = [
        [array for file in part for array in source.decode(read_content(source, folder, file))]
        for part in parts
    ]
    images, labels = zip(*decoded, strict=True)
    return np.concatenate(images), np.concatenate(labels)
