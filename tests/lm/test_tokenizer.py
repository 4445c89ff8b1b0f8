"""Text to tokens and back."""

import random

import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from forwax import lm


@pytest.fixture
def tokenizer(tiny, tmp_path):
    return lm.load_tokenizer(tiny().write(tmp_path / "tiny.gguf"))


def pieces(tokenizer, text):
    return [tokenizer.inner.id_to_token(token) for token in tokenizer.encode(text)]


def test_digits_stand_apart_and_merges_apply(tokenizer):
    assert pieces(tokenizer, " the 20.") == ["Ġthe", "Ġ", "2", "0", "."]
    assert pieces(tokenizer, "the") == ["t", "he"]


def test_without_digits_apart_they_merge(tiny, tmp_path):
    model = tiny()
    model.fields["tokenizer.ggml.pre"] = "gpt-2"
    tokenizer = lm.load_tokenizer(model.write(tmp_path / "tiny.gguf"))
    assert pieces(tokenizer, " the 20.") == ["Ġthe", "Ġ", "20", "."]


def test_special_words_are_their_own_tokens(tokenizer):
    text = "<|im_start|>the<|endoftext|>"
    tokens = tokenizer.encode(text)
    assert tokens[0] == 1
    assert tokens[-1] == 0
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode("") == []


def texts(count):
    """Texts of characters of all planes, controls and spaces among them; no surrogates."""
    draw = random.Random(0)
    ranges = [
        (0, 0x7F),
        (0x80, 0x7FF),
        (0x800, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
    ]
    for _ in range(count):
        length = draw.randrange(30)
        yield "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(length))


def test_decoded_is_what_was_encoded(tokenizer):
    for text in [
        *texts(500),
        "  two  spaces \n\r\t",
        "e\u0301 \u00e9 \ufeff \x00",
        "😀👩‍👩‍👧",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_number_that_is_no_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"tokens in \[0, 262\), got 262"):
        tokenizer.decode([262])
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode([-1])


def test_a_byte_without_a_word_is_refused(tiny, tmp_path):
    model = tiny()
    words = model.fields["tokenizer.ggml.tokens"]
    model.fields["tokenizer.ggml.tokens"] = [
        "rare" if word == chr(260) else word for word in words
    ]
    tokenizer = lm.load_tokenizer(model.write(tmp_path / "tiny.gguf"))
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    with pytest.raises(
        ValueError, match=r"the byte 0x04 of UTF-8, so expected a text without '\\x04'"
    ):
        tokenizer.encode("\x04")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("model", "llama", 'byte-level BPE, "gpt2", got "llama"'),
        ("pre", "qwen2", 'one of smollm, gpt-2, got "qwen2"'),
        ("add_bos_token", True, "add_bos_token is true"),
        ("merges", ["q q"], "merges of two words to a third, got 'q q'"),
        ("merges", ["q"], "merges of two words to a third, got 'q'"),
        ("tokens", ["a"] * 262, "expected 262 different words, got 1"),
        (
            "tokens",
            [f"w{i}" for i in range(262)],
            "printed character of ASCII, which lacks 95",
        ),
    ],
)
def test_other_vocabularies_are_refused(name, value, text, tiny, tmp_path):
    model = tiny()
    model.fields[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(ValueError, match=text):
        lm.load_tokenizer(model.write(tmp_path / "tiny.gguf"))


def test_a_truncated_file_is_refused(tiny, tmp_path):
    path = tiny().write(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="expected a whole GGUF file"):
        lm.load_tokenizer(path)
