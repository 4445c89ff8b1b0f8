"""Real data: digits, MNIST, Fashion-MNIST and CIFAR-10, verified and cached."""

from forwax.lab.data.dataset import DataError, DataSet
from forwax.lab.data.files import cache_dir, locate
from forwax.lab.data.loading import load
from forwax.lab.data.sources import find_source, names

__all__ = [
    "DataError",
    "DataSet",
    "cache_dir",
    "find_source",
    "load",
    "locate",
    "names",
]
