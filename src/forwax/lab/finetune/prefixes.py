"""Prefixes on disk, in blocks of texts, so that what was computed once need not be again."""

import hashlib
import io
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

from forwax import adapters
from forwax.lab.data import DataError, cache_dir
from forwax.lab.finetune.models import Model
from forwax.lab.report import replacing
from forwax.lab.training.progress import SECONDS_BETWEEN_LINES

BLOCK = 32
FORMAT = "forwax prefixes 1"
FOLDER = "prefixes"


def cached(model: Model, tokens: np.ndarray, mask: np.ndarray, layers: int) -> Any:
    """The prefixes of texts, in float16, from the cache where they are there.

    A block's file is named by the hash of all that it depends on: the model's weights, the tokens
    and the number of layers.

    Args:
        model: the model.
        tokens: integers [N, T], filled up on the left.
        mask: booleans [N, T], False for filling.
        layers: how many top layers the adapter acts behind.

    Returns:
        A `forwax.adapters.Prefix` of NumPy arrays, with texts in front.

    Raises:
        DataError: where the cache cannot be written.
    """
    padding = -len(tokens) % BLOCK
    # one shape for all blocks; the filling is a text again
    rows = np.concatenate([np.arange(len(tokens)), np.zeros(padding, int)])
    starts = range(0, len(rows), BLOCK)

    @jax.jit
    def compute(params: Any, tokens: Any, mask: Any) -> Any:
        found = adapters.cached_prefix(
            model.config, params, tokens, layers=layers, mask=mask
        )
        return jax.tree.leaves(found)

    blocks: list[list[np.ndarray]] = []
    for start in _told(starts, "caching prefixes"):
        own = rows[start : start + BLOCK]
        name = _name(model, tokens[own], mask[own], layers)
        path = cache_dir() / FOLDER / f"{name}.npz"
        found = _read(path)
        if found is None:
            found = _kept(compute(model.params, tokens[own], mask[own]))
            _write(path, found)
        blocks.append(found)
    joined: Any = [
        np.concatenate(leaves)[: len(tokens)] for leaves in zip(*blocks, strict=True)
    ]
    return adapters.Prefix(*joined)


def _name(model: Model, tokens: np.ndarray, mask: np.ndarray, layers: int) -> str:
    digest = hashlib.sha256(
        f"{FORMAT} {model.config.sha256} {model.is_packed} {layers} {tokens.shape}".encode()
    )
    digest.update(tokens.tobytes())
    digest.update(mask.tobytes())
    return digest.hexdigest()


def _kept(leaves: Sequence[Any]) -> list[np.ndarray]:
    """Floats in half precision where that holds them."""
    found = [np.asarray(leaf) for leaf in leaves]
    most = np.finfo(np.float16).max
    return [
        x.astype(np.float16) if x.dtype == np.float32 and np.abs(x).max() < most else x
        for x in found
    ]


def _read(path: Path) -> list[np.ndarray] | None:
    """A block's arrays; None where there is no whole file."""
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            return [file[f"arr_{number}"] for number in range(len(file.files))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _write(path: Path, arrays: list[np.ndarray]) -> None:
    stream = io.BytesIO()
    np.savez(stream, *arrays)
    try:
        with replacing(path) as draft:
            draft.write_bytes(stream.getvalue())
    except OSError as error:
        raise DataError(
            f"Expected to keep prefixes in {path.parent}, but got: {error}; set FORWAX_CACHE to a "
            "folder that can be written."
        ) from error


def _told(items: Sequence[int], name: str) -> Iterator[int]:
    """A bar on a terminal, lines elsewhere where it takes long."""
    if sys.stdout.isatty():
        yield from track(items, name)
        return
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{name}: {number} of {len(items)} blocks", flush=True)
        yield item
