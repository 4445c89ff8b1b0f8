"""Real data: digits, MNIST, Fashion-MNIST and CIFAR-10, verified and cached."""

from forwax.lab.data.sets import DataSet, find_source, names
from forwax.lab.data.store import cache_dir, load, locate
from forwax.lab.flags import DataError

__all__ = [
    "DataError",
    "DataSet",
    "cache_dir",
    "find_source",
    "load",
    "locate",
    "names",
]
