"""Language models: a file out of a package, the user's own, a random one that is built in."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from forwax import lm
from forwax.lab.flags import UsageError
from forwax.lab.texts import sets as texts
from forwax.lm.gguf_file import PACKED

TINY = "tiny-random"
SMOLLM2 = "smollm2"
TINY_CONFIG = lm.LlamaConfig(
    num_layers=2,
    width=32,
    num_heads=2,
    num_kv_heads=1,
    head_size=16,
    inner_width=32,
    num_words=256,
    context=64,
    name=TINY,
)
SEED = 4
STATE = np.float32(30)
LOGIT = np.float32(3)
"""The seed and sizes of the random model, with which the loss curves upwards at its start."""

SENTIMENT_WORDS = (" terrible", " great")
"""What stands for negative and positive behind "It was"."""


class TextCoder(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8.

    >>> Bytes().encode("é")
    [195, 169]
    """

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())


@dataclass(frozen=True, eq=False)
class Model:
    """A language model.

    Attributes:
        config: its sizes, its name and the hash of its weights.
        params: from `forwax.lm.load_gguf`, packed or not.
        tokenizer: text to tokens.
        is_packed: whether matrices are kept as small integers.
    """

    config: lm.LlamaConfig
    params: Any
    tokenizer: TextCoder
    is_packed: bool

    def label_words(
        self, given: tuple[str, ...], class_names: tuple[str, ...]
    ) -> list[int]:
        """The token that stands for each class.

        Args:
            given: the words that the user gave; none for those that suit the classes.
            class_names: the classes' names, in their order.

        Raises:
            UsageError: when there are none, or one is no single token.
        """
        words = given
        if not words and self.config.name == TINY:
            words = tuple("0123456789"[: len(class_names)])
        elif not words and class_names == texts.SENTIMENT:
            words = SENTIMENT_WORDS
        names = ", ".join(class_names)
        if len(words) != len(class_names):
            raise UsageError(
                f"--labels must name one word for each of the {len(class_names)} classes, {names}, "
                f"in this order, got {len(words)}."
            )
        found: list[int] = []
        for word in words:
            own = encoded(self, word)
            if len(own) != 1:
                raise UsageError(
                    f"--labels must be words that are one token each, but {word!r} is {len(own)} "
                    f"of {self.config.name}; try a common word, with a space in front."
                )
            found += own
        if len(set(found)) < len(found):
            raise UsageError(f"--labels must differ, got {', '.join(words)}.")
        return found


def encoded(model: Model, text: str) -> list[int]:
    """The tokens of a text.

    Raises:
        UsageError: for characters that the model has no word for.
    """
    try:
        return model.tokenizer.encode(text)
    except ValueError as error:
        raise UsageError(f"The text {text[:40]!r}: {error}") from error


def load(name: str, packed: bool, data_dir: Path | None = None) -> Model:
    """Load a model.

    Args:
        name: tiny-random, smollm2, or the path of a GGUF file.
        packed: whether matrices stay small integers.
        data_dir: a folder to look into first.

    Raises:
        UsageError: for a file that is no model that can be read, and without the extra `lm`.
        DataError: where smollm2 cannot be fetched.

    >>> load("tiny-random", packed=False).config.num_layers
    2
    """
    if name == TINY:
        return tiny(packed)
    path = Path(name)
    if name == SMOLLM2:
        path = texts.find(texts.SOURCES[SMOLLM2], data_dir)
    elif not path.is_file():
        raise UsageError(
            f"--model must be {TINY}, {SMOLLM2} or the path of a GGUF file, but {name!r} is "
            "neither."
        )
    try:
        config, params = lm.load_gguf(path, packed=packed)
        tokenizer = lm.load_tokenizer(path)
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    return Model(config, params, tokenizer, packed)


def tiny(packed: bool = False) -> Model:
    """Two layers of random weights, the same for ever, with bytes as words.

    Args:
        packed: whether matrices are kept as 8-bit integers.
    """
    # NumPy has promised that this old generator's numbers stay as they are
    rng = np.random.RandomState(SEED)
    config = TINY_CONFIG

    def matrices(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    layers = {
        name: matrices(config.num_layers, *shape)
        if len(shape) == 2
        else np.ones((config.num_layers, *shape), np.float32)
        for name, shape in config.shapes().items()
    }
    # states as long as those of trained models, beside which an adapter's first steps are small
    for name in ("attn_output", "ffn_down"):
        layers[name] *= STATE
    embedding = STATE * matrices(config.num_words, config.width)
    head = LOGIT * matrices(config.num_words, config.width)
    arrays = [*layers.values(), embedding, head]
    digest = hashlib.sha256(b"".join(x.tobytes() for x in arrays))
    kept = _packed if packed else jnp.asarray
    params = {
        "layers": {
            name: kept(x) if x.ndim == 3 else jnp.asarray(x)
            for name, x in layers.items()
        },
        "token_embd": kept(embedding),
        "output": kept(head),
        "output_norm": jnp.ones(config.width),
    }
    config = replace(config, sha256=digest.hexdigest())
    return Model(config, params, Bytes(), packed)


def _packed(matrix: np.ndarray) -> lm.Packed:
    """Blocks of 32 entries w = d q with q in [-127, 127], Q8_0."""
    import gguf

    blocks = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    return jax.tree.map(jnp.asarray, PACKED["Q8_0"](blocks))
