"""GGUF files to arrays, with the gguf package."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forwax.lm.config import LlamaConfig
from forwax.lm.packed import BLOCK, Packed

Blocks = np.ndarray
"""A tensor's bytes [out, bytes of a row]."""

HALF = 2
"""Bytes of a float16."""


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    packed: bool = False,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Read a model of the architecture `llama` from a GGUF file.

    Args:
        path: the file.
        dtype: the floating type of the parameters; forwards compute in it.
        packed: whether matrices in blocks of the types Q4_0, Q4_1 and Q8_0 stay as they are in the
            file, as `Packed`. All other types become arrays of `dtype`.

    Returns:
        The config, and the parameters by the file's own names: `params["layers"]["attn_q"]`
        [layers, out, in] and all others of a layer stacked alike, `params["token_embd"]` [words,
        width], `params["output_norm"]` [width], and `params["output"]` [words, width] where the
        head is not tied to the embedding.

    Raises:
        FileNotFoundError: when there is no such file.
        ImportError: without the extra `lm`.
        TypeError: when the dtype is not floating.
        ValueError: for a truncated or foreign file, another architecture, a field or tensor that is
            missing, not known or of another shape, and blocks of a type that cannot be read.

    Example:
        ```python
        config, params = lm.load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", packed=True)
        tokenizer = lm.load_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")
        logits = lm.forward(config, params, jnp.array([tokenizer.encode("The capital")]))
        ```
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"load_gguf: expected a floating dtype, got {dtype}.")
    path = Path(path)
    reader = opened(path, "load_gguf")
    config = _config(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    load = _Loader(path, tensors, dtype, packed)
    params = {
        "token_embd": load.one("token_embd", (config.num_words, config.width)),
        "output_norm": load.one("output_norm", (config.width,)),
        "layers": {
            name: load.stacked(name, shape, config.num_layers)
            for name, shape in config.shapes().items()
        },
    }
    if "output.weight" in tensors:
        params["output"] = load.one("output", (config.num_words, config.width))
    load.check_all_read()
    return config, params


def opened(path: Path, caller: str) -> Any:
    """The package's reader of a file; a ValueError for one that it cannot read."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{caller}: expected the package gguf; install the extra: pip install 'forwax[lm]'."
        ) from error
    if not path.is_file():
        raise FileNotFoundError(
            f"{caller}: expected a GGUF file at {path}, found none."
        )
    # The reader has no error of its own: what is cut short ends in whichever array comes next.
    try:
        return gguf.GGUFReader(path)
    except Exception as error:
        raise ValueError(
            f"{caller}: expected a whole GGUF file, but {path} is foreign or truncated: {error}. "
            "Fetch it again."
        ) from error


def field(path: Path, reader: Any, name: str, default: Any = None) -> Any:
    """A field's value; a ValueError where it is missing and there is no default."""
    found = reader.get_field(name)
    if found is not None:
        return found.contents()
    if default is None:
        raise ValueError(f"{path}: expected the field {name}, which the file lacks.")
    return default


def _config(path: Path, reader: Any) -> LlamaConfig:
    architecture = field(path, reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: expected a model of the architecture llama, got {architecture}."
        )

    def get(name: str, default: Any = None) -> Any:
        return field(path, reader, f"llama.{name}", default)

    heads = get("attention.head_count")
    width = get("embedding_length")
    head_size = get("attention.key_length", width // heads)
    # What the forward pass does not do must not be asked for.
    wanted = {
        "llama.rope.scaling.type": (get("rope.scaling.type", "none"), "none"),
        "llama.rope.dimension_count": (
            get("rope.dimension_count", head_size),
            head_size,
        ),
        "llama.attention.value_length": (
            get("attention.value_length", head_size),
            head_size,
        ),
        "llama.expert_count": (get("expert_count", 0), 0),
    }
    for name, (got, expected) in wanted.items():
        if got != expected:
            raise ValueError(f"{path}: expected {name} to be {expected}, got {got}.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return LlamaConfig(
        num_layers=get("block_count"),
        width=width,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_size=head_size,
        inner_width=get("feed_forward_length"),
        num_words=len(field(path, reader, "tokenizer.ggml.tokens")),
        context=get("context_length"),
        rms_epsilon=float(get("attention.layer_norm_rms_epsilon")),
        rope_base=float(get("rope.freq_base", 10_000.0)),
        name=field(path, reader, "general.name", path.stem),
        sha256=digest,
    )


class _Loader:
    """Reads tensors, and remembers which."""

    def __init__(
        self, path: Path, tensors: dict[str, Any], dtype: Any, packed: bool
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.dtype = dtype
        self.packed = packed
        self.read: set[str] = set()

    def one(self, name: str, shape: tuple[int, ...]) -> Any:
        """The tensor `name.weight`."""
        return jax.tree.map(jnp.asarray, self._value(f"{name}.weight", shape))

    def stacked(self, name: str, shape: tuple[int, ...], num_layers: int) -> Any:
        """The tensors `blk.i.name.weight` of all layers, with these in front."""
        names = [f"blk.{index}.{name}.weight" for index in range(num_layers)]
        values = [self._value(full, shape) for full in names]
        kinds = {self.tensors[full].tensor_type.name for full in names}
        if len(kinds) > 1 and any(isinstance(value, Packed) for value in values):
            raise ValueError(
                f"{self.path}: packed=True expects one type for {name} in all layers, got "
                f"{', '.join(sorted(kinds))}. Load it without packed=True."
            )
        return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *values)

    def check_all_read(self) -> None:
        """Raise a ValueError for tensors that the forward pass would not use."""
        unknown = sorted(set(self.tensors) - self.read)
        if unknown:
            raise ValueError(
                f"{self.path}: expected the tensors of a llama model without biases or scaled "
                f"positions, got these too: {', '.join(unknown[:5])}."
            )

    def _value(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self.tensors:
            raise ValueError(
                f"{self.path}: expected the tensor {name} {list(shape)}, which the file lacks."
            )
        self.read.add(name)
        tensor = self.tensors[name]
        # The file counts axes from the last one.
        got = tuple(int(size) for size in reversed(tensor.shape))
        if got != shape:
            raise ValueError(
                f"{self.path}: expected the tensor {name} to be {list(shape)}, got {list(got)}."
            )
        kind = tensor.tensor_type.name
        if kind not in PACKED:
            return _plain(self.path, tensor).reshape(shape).astype(self.dtype)
        blocks = PACKED[kind](tensor.data)
        if self.packed and len(shape) > 1:
            return blocks
        return blocks.dense(self.dtype, np).reshape(shape)


def _plain(path: Path, tensor: Any) -> np.ndarray:
    """The entries of a tensor of any type that the gguf package reads."""
    import gguf

    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: expected blocks of a type that the gguf package reads, but {tensor.name} "
            f"has the type {tensor.tensor_type.name}."
        ) from error


def _parts(data: Blocks, sizes: Sequence[int]) -> list[np.ndarray]:
    """The parts of each block, of the given sizes in bytes, [out, blocks, size] each."""
    # [out, blocks, bytes of a block]
    blocks = data.reshape(*data.shape[:-1], -1, sum(sizes))
    ends = np.cumsum(sizes)
    return [
        np.ascontiguousarray(blocks[..., end - size : end])
        for end, size in zip(ends, sizes, strict=True)
    ]


def _halves(data: np.ndarray) -> np.ndarray:
    """Two bytes [..., 2] as a float16 [...]."""
    return data.view(np.float16)[..., 0]


def _q4_0(data: Blocks) -> Packed:
    scale, quants = _parts(data, (HALF, BLOCK // 2))
    return Packed(quants, _halves(scale))


def _q4_1(data: Blocks) -> Packed:
    scale, offset, quants = _parts(data, (HALF, HALF, BLOCK // 2))
    return Packed(quants, _halves(scale), _halves(offset))


def _q8_0(data: Blocks) -> Packed:
    scale, quants = _parts(data, (HALF, BLOCK))
    return Packed(quants.view(np.int8), _halves(scale))


PACKED: dict[str, Callable[[Blocks], Packed]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
"""How the blocks of each type are read that can stay packed."""
