"""Adapters in files of the format safetensors."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from forwax.adapters.base import Base
from forwax.adapters.last_token import LastTokenAdapter
from forwax.adapters.lora import LoraAdapter
from forwax.lm.config import LlamaConfig

FORMAT = "forwax adapter 1"
LORA = "lora"
LAST_TOKEN = "last-token"
EVERY = "every"


def save(path: str | os.PathLike[str], adapter: Any) -> None:
    """Write an adapter to a file, which is replaced in one move.

    The file holds the trained arrays as they are, and in its metadata the kind, rank, scale and
    place, and the name and hash of the model that the adapter was made for. Nothing in it is code.

    Args:
        path: the file.
        adapter: from `lora` or `last_token`.

    Raises:
        ImportError: without the extra `lm`.
        TypeError: for anything else.

    Example:
        ```python
        adapters.save("adapter.safetensors", adapter)
        adapter = adapters.load("adapter.safetensors", config=config)
        ```
    """
    tensors, metadata = _parts(adapter)
    metadata = {
        **metadata,
        "format": FORMAT,
        "scale": repr(float(adapter.scale)),
        "base": adapter.base.name,
        "base_sha256": adapter.base.sha256,
    }
    write(path, tensors, metadata)


def write(
    path: str | os.PathLike[str], tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Write named arrays and what is told of them, in one move.

    Raises:
        ImportError: without the extra `lm`.
    """
    safetensors = _package("save")
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    path = Path(path)
    # A reader never sees half a file.
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        draft.write_bytes(safetensors.numpy.save(arrays, metadata))
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def load(
    path: str | os.PathLike[str],
    *,
    config: LlamaConfig | None = None,
) -> LoraAdapter | LastTokenAdapter:
    """Read what `save` wrote, bit for bit.

    Args:
        path: the file.
        config: the model on which the adapter is to be used; None for no check.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: when there is no such file.
        ImportError: without the extra `lm`.
        ValueError: for a truncated or foreign file, or an adapter that was made for another model's
            file than the config's.

    Example:
        ```python
        logits = lm.forward(config, params, tokens, adapter=adapters.load(path, config=config))
        ```
    """
    safetensors = _package("load")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: expected an adapter at {path}, found no file.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"load: expected an adapter in safetensors, but {path} is foreign or truncated: "
            f"{error}."
        ) from error
    # Any file of the format is whole, but few are adapters.
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f'load: expected "{FORMAT}" in the metadata of {path}, got '
            f"{metadata.get('format')!r}. It was not written by adapters.save."
        )
    try:
        adapter = _whole(tensors, metadata)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"load: expected arrays and metadata that fit together, but {path} is damaged: "
            f"{error!r}."
        ) from error
    _check_base(path, adapter.base, config)
    return adapter


def _check_base(path: Path, base: Base, config: LlamaConfig | None) -> None:
    """Raise a ValueError where both hashes are known and differ."""
    if config is None or not base.sha256 or not config.sha256:
        return
    if base.sha256 != config.sha256:
        raise ValueError(
            f"load: {path} was made for {base.name}, sha256 {base.sha256[:12]}…, expected "
            f"{config.name}, {config.sha256[:12]}…. Load that model, or leave config out."
        )


def _package(caller: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"{caller}: expected the package safetensors; install the extra: pip install "
            "'forwax[lm]'."
        ) from error
    return safetensors


def _parts(adapter: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """An adapter's arrays by their names, and what is known of its kind alone."""
    if isinstance(adapter, LastTokenAdapter):
        num_layers, _, rank = adapter.weights.shape
        token = EVERY if adapter.everywhere else "the last"
        metadata = {
            "kind": LAST_TOKEN,
            "rank": str(rank),
            "place": f"{token} token behind the top {num_layers} layers",
            "seed": str(adapter.seed),
        }
        return {"weights": adapter.weights}, metadata
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(
            "save: expected an adapter of adapters.lora or adapters.last_token, got "
            f"{type(adapter).__name__}."
        )
    names = sorted(adapter.down)
    metadata = {
        "kind": LORA,
        "rank": str(adapter.down[names[0]].shape[-1]),
        "place": " ".join(names),
    }
    down = {f"{name}.down": adapter.down[name] for name in names}
    up = {f"{name}.up": adapter.up[name] for name in names}
    return {**down, **up}, metadata


def _whole(
    tensors: dict[str, Any],
    metadata: dict[str, str],
) -> LoraAdapter | LastTokenAdapter:
    """The adapter of a file's arrays and metadata; any error where they do not fit."""
    kind = metadata["kind"]
    rank = int(metadata["rank"])
    scale = float(metadata["scale"])
    base = Base(metadata["base"], metadata["base_sha256"])
    arrays = {name: jnp.asarray(x) for name, x in tensors.items()}
    if kind == LAST_TOKEN:
        weights = arrays.pop("weights")
        if arrays or weights.ndim != 3 or weights.shape[2] != rank:
            raise ValueError(f"weights {weights.shape} of rank {rank}, and {[*arrays]}")
        seed = int(metadata["seed"])
        everywhere = metadata["place"].startswith(EVERY)
        return LastTokenAdapter(weights, seed, scale, base, everywhere)
    if kind != LORA:
        raise ValueError(f"an adapter of the kind {kind}")
    names = metadata["place"].split(" ")
    down = {name: arrays.pop(f"{name}.down") for name in names}
    up = {name: arrays.pop(f"{name}.up") for name in names}
    for name in names:
        fits = down[name].ndim == up[name].ndim == 3
        if not fits or down[name].shape[2] != rank or up[name].shape[1] != rank:
            raise ValueError(f"factors of {name} of another rank than {rank}")
    if arrays:
        raise ValueError(f"arrays that no place has: {[*arrays]}")
    return LoraAdapter(down, up, scale, base)
