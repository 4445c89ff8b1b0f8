"""Text to tokens and back, from what a GGUF file says of its vocabulary."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forwax.lm.gguf_file import field, opened

SPLITTERS = {"smollm": True, "gpt-2": False}
"""How texts are split before merges, by the file's name; whether each digit stands by itself."""

SPECIAL = 3
"""The type of a token that is no text, such as the end of a turn."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Byte-level pair encoding (Sennrich et al. 2016, arXiv 1508.07909), made by `load_tokenizer`.

    Attributes:
        inner: the tokenizer of the package tokenizers.
        unsayable: the bytes that the vocabulary has no word for, such as some control characters.

    Example:
        ```python
        tokenizer = lm.load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("The capital of France is"))
        ```
    """

    inner: Any
    unsayable: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Nothing is put in front, and special words are their own tokens.

        Raises:
            ValueError: for a text with bytes that the vocabulary has no word for: they would be
                left out.

        Example:
            ```python
            tokenizer.encode("The capital of France is")  # [504, 3575, 282, 4649, 314]
            ```
        """
        # The package drops such bytes without a word.
        wrong = self.unsayable.intersection(text.encode())
        if wrong:
            byte = min(wrong)
            character = next(x for x in text if byte in x.encode())
            raise ValueError(
                f"encode: the vocabulary has no word for the byte {byte:#04x} of UTF-8, so "
                f"expected a text without {character!r}. Remove the character."
            )
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; of those of a whole text, that text.

        Raises:
            ValueError: for a number that is no token's.

        Example:
            ```python
            tokenizer.decode([7042])  # " Paris"
            ```
        """
        numbers = [int(number) for number in ids]
        num_words = self.inner.get_vocab_size()
        wrong = [number for number in numbers if not 0 <= number < num_words]
        if wrong:
            raise ValueError(
                f"decode: expected tokens in [0, {num_words}), got {wrong[0]}."
            )
        return self.inner.decode(numbers, skip_special_tokens=False)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Make the tokenizer of a model from its GGUF file.

    Args:
        path: the file.

    Returns:
        A tokenizer with `encode(text) -> list[int]` and `decode(ids) -> str`.

    Raises:
        FileNotFoundError: when there is no such file.
        ImportError: without the extra `lm`.
        ValueError: for a truncated or foreign file, a missing field, a vocabulary that is not
            byte-level BPE, texts that are split by other rules than "smollm" and "gpt-2", or a
            token that wants to be put in front of every text.

    Example:
        ```python
        lm.load_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf").encode(" made in 2024.")
        ```
    """
    path = Path(path)
    reader = opened(path, "load_tokenizer")
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "load_tokenizer: expected the package tokenizers; install the extra: pip install "
            "'forwax[lm]'."
        ) from error
    digits_apart = _checked(path, reader)
    words = field(path, reader, "tokenizer.ggml.tokens")
    merges = [
        tuple(merge.split(" "))
        for merge in field(path, reader, "tokenizer.ggml.merges")
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    letters = _letters()
    _check_words(path, vocabulary, len(words), merges, letters)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    # No space is put in front of a text.
    splitters: list[Any] = [byte_level(add_prefix_space=False)]
    if digits_apart:
        splitters.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splitters)
    inner.decoder = tokenizers.decoders.ByteLevel()
    kinds = field(path, reader, "tokenizer.ggml.token_type")
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == SPECIAL]
    inner.add_special_tokens(
        [
            tokenizers.AddedToken(word, special=True, normalized=False)
            for word in special
        ]
    )
    unsayable = {
        byte for byte, letter in enumerate(letters) if letter not in vocabulary
    }
    return Tokenizer(inner, frozenset(unsayable))


def _letters() -> list[str]:
    """The letter that stands for each byte: itself where that is printed, else from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printed else next(shifted)) for byte in range(256)]


def _checked(path: Path, reader: Any) -> bool:
    """Whether digits stand apart, after the checks of what the file asks for."""
    model = field(path, reader, "tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(
            f'{path}: expected a vocabulary of byte-level BPE, "gpt2", got "{model}".'
        )
    splitter = field(path, reader, "tokenizer.ggml.pre")
    if splitter not in SPLITTERS:
        known = ", ".join(SPLITTERS)
        raise ValueError(
            f'{path}: expected texts that are split as one of {known}, got "{splitter}".'
        )
    name = "tokenizer.ggml.add_bos_token"
    if reader.get_field(name) is not None and field(path, reader, name):
        raise ValueError(
            f"{path}: expected texts without a token in front, but {name} is true."
        )
    return SPLITTERS[splitter]


def _check_words(
    path: Path,
    vocabulary: dict[str, int],
    num_words: int,
    merges: list[tuple[str, ...]],
    letters: list[str],
) -> None:
    """Raise a ValueError for a vocabulary that is not byte-level BPE."""
    if len(vocabulary) != num_words:
        raise ValueError(
            f"{path}: expected {num_words} different words, got {len(vocabulary)}."
        )
    # Rare bytes may lack a word, as in SmolLM2's; ASCII that is printed may not.
    missing = [letter for letter in letters[32:127] if letter not in vocabulary]
    if missing:
        raise ValueError(
            f"{path}: expected a vocabulary of byte-level BPE, with a word for each printed "
            f"character of ASCII, which lacks {len(missing)}: {''.join(missing[:8])}."
        )
    for merge in merges:
        known = len(merge) == 2 and {*merge, "".join(merge)} <= vocabulary.keys()
        if not known:
            raise ValueError(
                f"{path}: expected merges of two words to a third, got {' '.join(merge)!r}."
            )
