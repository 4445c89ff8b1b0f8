"""``forwax data``: where each data set is; ``forwax data SET``: fetch one, or say where it is."""

from pathlib import Path

import numpy as np

from forwax.lab.data import DataError, find_source, load, locate
from forwax.lab.data.sets import SOURCES
from forwax.lab.options.data import DataOptions
from forwax.lab.report import Table, print_tables
from forwax.lab.texts import sets as texts

DIGITS_PLACE = "comes with scikit-learn"


def run(options: DataOptions) -> int:
    """Print what was asked for.

    Args:
        options: the command's options.

    Returns:
        The exit code, 0.

    Raises:
        DataError: if the set is unknown, damaged, or cannot be fetched.

    Example:
        ```sh
        forwax data digits
        ```
    """
    if options.name is None:
        print_tables(table(options.data_dir))
    elif options.name in (texts.TINY, *texts.SOURCES):
        print(texts.describe(options.name, options.data_dir))
    else:
        print(describe(options.name, options.data_dir))
    return 0


def describe(name: str, data_dir: Path | None = None) -> str:
    """Load a set, fetching it if need be, and tell its place, sizes, shapes and class counts.

    Args:
        name: one of ``names()``.
        data_dir: a folder to look into first.

    Returns:
        Several lines of text.

    Raises:
        DataError: if the set is unknown, damaged, or cannot be fetched.

    Example:
        >>> print(describe("digits"))
        digits: comes with scikit-learn
          training: 1,437 images of 8x8x1, uint8 from 0 to 16
          test: 360 images of 8x8x1, uint8 from 0 to 16
          class           training      test
          0                    142        36
          ...
    """
    place = _place(name, data_dir)
    data = load(name, data_dir)
    place = place or f"fetched, now {_place(name, data_dir)}"
    verified = "" if name == "digits" else ", checksums verified"
    lines = [f"{name}: {place}{verified}"]
    for split, images in (("training", data.train_images), ("test", data.test_images)):
        shape = "x".join(map(str, images.shape[1:]))
        lines.append(
            f"  {split}: {len(images):,} images of {shape}, uint8 from 0 to {data.scale}"
        )
    lines.append(f"  {'class':<14}{'training':>10}{'test':>10}")
    splits = (data.train_labels, data.test_labels)
    counts = (np.bincount(labels, minlength=data.num_classes) for labels in splits)
    for label, in_train, in_test in zip(data.class_names, *counts, strict=True):
        lines.append(f"  {label:<14}{in_train:>10,}{in_test:>10,}")
    return "\n".join(lines)


def table(data_dir: Path | None = None) -> Table:
    """All sets and where each is, found without reading or fetching anything.

    Args:
        data_dir: a folder to look into first.

    Returns:
        A table, one row a set.

    Example:
        >>> len(table().rows)
        8
    """
    rows = [("digits", "10", DIGITS_PLACE)]
    for name, source in SOURCES.items():
        absent = f"not here; `forwax data {name}` fetches it ({source.megabytes} MB)"
        try:
            place = _place(name, data_dir) or absent
        except DataError as error:
            place = str(error)
        rows.append((name, str(len(source.class_names)), place))
    rows += texts.rows(data_dir)
    return Table(("set", "classes", "where"), rows, numeric=False)


def _place(name: str, data_dir: Path | None) -> str | None:
    if name == "digits":
        return DIGITS_PLACE
    folder = locate(find_source(name), data_dir)
    return f"found in {folder}" if folder else None
