"""Sets as other tools keep them, and their second homes."""

import hashlib
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from forwax.lab.data.formats import CIFAR_SHAPE
from forwax.lab.data.sets import Source

MIRRORS = {"mnist": ("https://storage.googleapis.com/cvdf-datasets/mnist/",)}
"""Other homes of a set, tried in turn."""

TORCHVISION = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
"""Where torchvision keeps the same files."""

BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""The md5 of CIFAR-10's files for Python, which torchvision keeps."""


def homes(source: Source) -> Iterator[Source]:
    """The set with each of its homes, its own first."""
    yield source
    for home in MIRRORS.get(source.name, ()):
        yield replace(source, home=home)


def forms(source: Source) -> Iterator[Source]:
    """The set in each form that it may be found in, its own first."""
    yield source
    if source.name in TORCHVISION:
        yield replace(source, folder=TORCHVISION[source.name])
    if source.name == "cifar10":
        yield replace(
            source,
            folder="cifar-10-batches-py",
            checksums=BATCHES,
            train=tuple(BATCHES)[:5],
            test=tuple(BATCHES)[5:],
            decode=decode_pickled,
            largest=40_000_000,
        )


def decode_pickled(content: bytes) -> tuple[np.ndarray, ...]:
    """Decode one of CIFAR-10's files for Python: a pickled dictionary.

    Args:
        content: the bytes of the file.

    Returns:
        Images and labels as of `decode_cifar`.

    Raises:
        ValueError: for any other content. A pickle may run what it likes, and is not read then.
    """
    if hashlib.md5(content, usedforsecurity=False).hexdigest() not in BATCHES.values():
        raise ValueError(
            "is no file of CIFAR-10 known by its md5, and is not unpickled"
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # NumPy's, of the old form in which they were pickled
        found = pickle.loads(content, encoding="bytes")
    planes = np.asarray(found[b"data"], np.uint8).reshape(-1, *CIFAR_SHAPE)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return images, np.asarray(found[b"labels"], np.int32)
