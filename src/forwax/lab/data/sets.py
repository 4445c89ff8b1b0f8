"""The data sets: what loading gives, and what is known of each one's files and home."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forwax.lab.data.formats import decode_cifar, decode_idx
from forwax.lab.flags import DataError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
"""The arrays of a `DataSet`, in their order."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled images, split into training and test.

    Pixels are kept as they were stored; divide by ``scale`` for values in [0, 1].

    Attributes:
        name: the name that ``load`` knows it by.
        train_images: uint8 [N, height, width, channels].
        train_labels: int32 [N], from 0 to ``num_classes - 1``.
        test_images: uint8 [M, height, width, channels].
        test_labels: int32 [M].
        num_classes: the number of classes.
        class_names: one name for each label.
        scale: the largest value that a pixel can have, 16 or 255.

    Example:
        >>> import numpy as np
        >>> image, label = np.full((1, 2, 2, 1), 255, np.uint8), np.zeros(1, np.int32)
        >>> names = {"num_classes": 1, "class_names": ("white",)}
        >>> data = DataSet("white", image, label, image, label, scale=255, **names)
        >>> data.train_images.max() / data.scale
        np.float64(1.0)
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]
    scale: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One public data set in its standard files.

    Attributes:
        name: the name that ``load`` knows it by.
        folder: the standard name of the folder that holds its files.
        home: where it is fetched: a web folder that holds ``<file>.gz``, or one archive.
        megabytes: the size of the download, in units of 10⁶ bytes.
        checksums: the hash of each file's decompressed content.
        class_names: one name for each label.
        train: the files of the training split; their arrays are images and labels in turn.
        test: the files of the test split.
        decode: from a file's decompressed content to its arrays.
        archive: whether ``home`` is one ``.tar.gz`` that holds ``<folder>/<file>``.
        hash: which one ``checksums`` are, by its name in ``hashlib``.
        largest: the bytes of its largest file; nothing is unpacked to more.
    """

    name: str
    folder: str
    home: str
    megabytes: int
    checksums: dict[str, str]
    class_names: tuple[str, ...]
    train: tuple[str, ...] = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test: tuple[str, ...] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    decode: Callable[[bytes], tuple[np.ndarray, ...]] = decode_idx
    archive: bool = False
    hash: str = "md5"
    largest: int | None = None


MNIST = Source(
    name="mnist",
    folder="mnist",
    home="https://ossci-datasets.s3.amazonaws.com/mnist/",
    megabytes=12,
    checksums={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    class_names=tuple("0123456789"),
    largest=47_040_016,
)

FASHION_MNIST = Source(
    name="fashion-mnist",
    folder="fashion-mnist",
    # The bucket's website has no https; the checksums guard the content.
    home="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    megabytes=31,
    checksums={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    class_names=(
        "T-shirt/top", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    largest=47_040_016,
)  # fmt: skip

CIFAR10 = Source(
    name="cifar10",
    folder="cifar-10-batches-bin",
    home="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    megabytes=170,
    checksums={
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    class_names=(
        "airplane", "automobile", "bird", "cat", "deer",
        "dog", "frog", "horse", "ship", "truck",
    ),
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    decode=decode_cifar,
    archive=True,
    largest=30_730_000,
)  # fmt: skip

SOURCES = {source.name: source for source in (MNIST, FASHION_MNIST, CIFAR10)}


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


def load_digits() -> DataSet:
    """scikit-learn's handwritten digits in a fixed stratified split of 1,437 and 360.

    Example:
        >>> data = load_digits()
        >>> data.train_images.shape, data.test_images.shape, data.scale
        ((1437, 8, 8, 1), (360, 8, 8, 1), 16)
    """
    # Imported here, since scikit-learn takes over a second to import and only this set needs it.
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = np.asarray(images).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(labels).astype(np.int32)
    # images of training and test, then labels of training and test
    parts: Any = model_selection.train_test_split(
        images,
        labels,
        test_size=360,
        random_state=0,
        stratify=labels,
    )
    return DataSet(
        "digits",
        *parts[::2],
        *parts[1::2],
        num_classes=10,
        class_names=tuple("0123456789"),
        scale=16,
    )
