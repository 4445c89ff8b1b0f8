"""What is known of each public data set: its files, their checksums, and its home."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from forwax.lab.data.dataset import DataError
from forwax.lab.data.formats import decode_cifar, decode_idx


@dataclass(frozen=True)
class Source:
    """One public data set in its standard files.

    A *part* is one or more files that together give images and labels; a split is its parts in
    order.

    Attributes:
        name: the name that ``load`` knows it by.
        folder: the standard name of the folder that holds its files.
        train: the parts of the training split, each a tuple of file names.
        test: the parts of the test split.
        checksums: the md5 of each file's decompressed content.
        decode: from a file's decompressed content to its arrays.
        home: where it is fetched: a web folder that holds ``<file>.gz``, or one archive.
        archive: whether ``home`` is one ``.tar.gz`` that holds ``<folder>/<file>``.
        megabytes: the size of the download, in units of 10⁶ bytes.
        class_names: one name for each label.
    """

    name: str
    folder: str
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    checksums: dict[str, str]
    decode: Callable[[bytes], tuple[np.ndarray, ...]]
    home: str
    archive: bool
    megabytes: int
    class_names: tuple[str, ...]


def _idx_source(
    name: str,
    home: str,
    megabytes: int,
    md5s: tuple[str, ...],
    class_names: tuple[str, ...],
) -> Source:
    train = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    checksums: dict[str, str] = dict(zip(train + test, md5s, strict=True))
    return Source(
        name,
        name,
        (train,),
        (test,),
        checksums,
        decode_idx,
        home,
        False,
        megabytes,
        class_names,
    )


MNIST = _idx_source(
    "mnist",
    home="https://ossci-datasets.s3.amazonaws.com/mnist/",
    megabytes=12,
    md5s=(
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    class_names=tuple("0123456789"),
)

FASHION_MNIST = _idx_source(
    "fashion-mnist",
    # The bucket's website has no https; the checksums guard the content.
    home="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    megabytes=31,
    md5s=(
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
    class_names=(
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
)  # fmt: skip

CIFAR10 = Source(
    name="cifar10",
    folder="cifar-10-batches-bin",
    train=tuple((f"data_batch_{i}.bin",) for i in range(1, 6)),
    test=(("test_batch.bin",),),
    checksums={
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    decode=decode_cifar,
    home="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    archive=True,
    megabytes=170,
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in (MNIST, FASHION_MNIST, CIFAR10)}


def names() -> tuple[str, ...]:
    """Every name that ``load`` knows.

    Example:
        >>> names()
        ('digits', 'mnist', 'fashion-mnist', 'cifar10')
    """
    return ("digits", *SOURCES)


def find_source(name: str) -> Source:
    """The public data set of this name.

    Args:
        name: one of ``names()`` except ``digits``, which has no files.

    Raises:
        DataError: if there is none.

    Example:
        >>> find_source("cifar10").folder
        'cifar-10-batches-bin'
    """
    if name not in SOURCES:
        raise DataError(
            f"Expected a data set's name, but got {name!r}; choose one of {', '.join(names())}."
        )
    return SOURCES[name]
