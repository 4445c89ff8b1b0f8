"""SHA-256 sums of what is kept, by which damage is told from what was written."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

from forwax.lab.report import Json

SEAL = "sha256"
"""The entry of a sealed object that holds the sum of all others."""


def sum_of(value: Any) -> str:
    """Give the SHA-256 of what JSON can hold, whatever the order of its keys.

    >>> sum_of({"a": 1, "b": 2}) == sum_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: Json) -> Json:
    """Add the sum of an object to it.

    >>> is_sound(sealed({"a": 1})), is_sound(sealed({"a": 1}) | {"a": 2}), is_sound({"a": 1})
    (True, False, None)
    """
    return value | {SEAL: sum_of(value)}


def unsealed(value: Json) -> Json:
    """Give a sealed object as it was."""
    return {name: each for name, each in value.items() if name != SEAL}


def is_sound(value: Json) -> bool | None:
    """Say whether an object is what was sealed; None where it never was."""
    return value[SEAL] == sum_of(unsealed(value)) if SEAL in value else None


def declared(tree: Any) -> Json:
    """Give the dtype and the shape of each leaf of a tree of arrays or shapes, by its path.

    >>> declared({"w": np.zeros(3, np.float32)})
    {"['w']": 'float32[3]'}
    """
    return {name: kind_of(leaf) for name, leaf in _named(tree).items()}


def leaf_sums(tree: Any) -> Json:
    """Give the SHA-256 of each leaf of a tree of arrays, by its path."""
    sums = {}
    for name, leaf in _named(tree).items():
        content = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        sums[name] = hashlib.sha256(content.data).hexdigest()
    return sums


def kind_of(leaf: Any) -> str:
    """Write the dtype and the shape of an array in short."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _named(tree: Any) -> Json:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
