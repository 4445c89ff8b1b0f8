"""The forward pass of a file against a literal definition, and the real model's stored logits."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gguf")

from forwax import lm

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
PACKED = ["Q8_0", "Q4_0", "Q4_1"]
TOKENS = np.array([[5, 80, 2, 9, 80], [1, 0, 255, 33, 34]])
HEADS, SIZE, EPSILON, BASE = 4, 16, 1e-5, 1000.0


def numbers(data, kind):
    """The entries of a matrix's bytes, block by block as the page has it."""
    if kind == "F32":
        return data.astype(np.float64)
    if kind == "F16":
        return data.view(np.float16).astype(np.float64)
    if kind == "BF16":
        bits = data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    return np.array(
        [
            np.concatenate([one_block(block, kind) for block in row.reshape(-1, size)])
            for row in data
        ]
    )


def one_block(block, kind):
    scale = float(block[:2].view(np.float16)[0])
    if kind == "Q8_0":
        return scale * block[2:].view(np.int8).astype(np.float64)
    offset = -8 * scale if kind == "Q4_0" else float(block[2:4].view(np.float16)[0])
    halves = block[-16:]
    return scale * np.concatenate([halves & 15, halves >> 4]) + offset


def literal(path, tokens):
    """Logits [T, words] of one text, token by token and head by head, in float64."""
    import gguf

    w = {
        tensor.name.removesuffix(".weight"): numbers(
            tensor.data, tensor.tensor_type.name
        )
        for tensor in gguf.GGUFReader(path).tensors
    }

    def norm(x, gain):
        return x / np.sqrt(np.mean(x**2) + EPSILON) * gain

    def turned(x, position):
        out = x.copy()
        for pair in range(SIZE // 2):
            angle = position * BASE ** (-2 * pair / SIZE)
            a, b = x[2 * pair], x[2 * pair + 1]
            out[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            out[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
        return out

    states = [w["token_embd"][token] for token in tokens]
    for layer in range(3):
        of = {name: w[f"blk.{layer}.{name}"] for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
            "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
        )}  # fmt: skip
        inputs = [norm(x, of["attn_norm"]) for x in states]
        keys = [(of["attn_k"] @ x).reshape(-1, SIZE) for x in inputs]
        values = [(of["attn_v"] @ x).reshape(-1, SIZE) for x in inputs]
        for t, x in enumerate(inputs):
            mixed = []
            for head, query in enumerate((of["attn_q"] @ x).reshape(HEADS, SIZE)):
                shared = head // 2
                query = turned(query, t)
                scores = np.array(
                    [
                        query @ turned(keys[s][shared], s) / np.sqrt(SIZE)
                        for s in range(t + 1)
                    ]
                )
                weights = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(weights[s] * values[s][shared] for s in range(t + 1)))
            states[t] = states[t] + of["attn_output"] @ np.concatenate(mixed)
        for t, x in enumerate(states):
            x = norm(x, of["ffn_norm"])
            gate = of["ffn_gate"] @ x
            inner = gate / (1 + np.exp(-gate)) * (of["ffn_up"] @ x)
            states[t] = states[t] + of["ffn_down"] @ inner
    head = w.get("output", w["token_embd"])
    return np.array([head @ norm(x, w["output_norm"]) for x in states])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_literal_definition(kind, tied, tiny, tmp_path):
    path = tiny(kind, tied=tied).write(tmp_path / "tiny.gguf")
    config, params = lm.load_gguf(path)
    logits = jax.jit(lm.forward, static_argnums=0)(config, params, TOKENS)
    assert logits.shape == (2, 5, config.num_words)
    assert ("output" in params) is not tied
    for row, tokens in zip(logits, TOKENS, strict=True):
        np.testing.assert_allclose(row, literal(path, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_is_unpacked(kind, tied, tiny, tmp_path, monkeypatch):
    # Words in three blocks, the last of them smaller.
    monkeypatch.setattr(lm.packed, "ROWS_AT_A_TIME", 100)
    path = tiny(kind, tied=tied).write(tmp_path / "tiny.gguf")
    config, params = lm.load_gguf(path)
    same, packed = lm.load_gguf(path, packed=True)
    assert same == config
    assert hash(same) == hash(config)
    unpacked = jax.tree.map(
        lambda x: x.dense(jnp.float32) if isinstance(x, lm.Packed) else x,
        packed,
        is_leaf=lambda x: isinstance(x, lm.Packed),
    )
    jax.tree.map(np.testing.assert_array_equal, unpacked, params)
    logits = lm.forward(config, packed, TOKENS)
    np.testing.assert_allclose(
        logits, lm.forward(config, params, TOKENS), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_bit_for_bit_those_of_the_package(kind, tiny, tmp_path):
    import gguf

    path = tiny(kind).write(tmp_path / "tiny.gguf")
    _, params = lm.load_gguf(path)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for index in range(3):
        tensor = tensors[f"blk.{index}.ffn_down.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(params["layers"]["ffn_down"][index], expected)


def test_filling_on_the_left_changes_nothing(tiny, tmp_path):
    config, params = lm.load_gguf(tiny().write(tmp_path / "tiny.gguf"))
    padded = np.concatenate([np.full((2, 3), 7), TOKENS], axis=1)
    mask = np.arange(8)[None] >= np.array([[3], [3]])
    expected = lm.forward(config, params, TOKENS)
    logits = lm.forward(config, params, padded, mask=mask)
    np.testing.assert_allclose(logits[:, 3:], expected, rtol=0, atol=1e-4)
    assert jnp.isfinite(logits).all()
    without = lm.forward(config, params, padded)
    assert jnp.abs(without[:, 3:] - expected).max() > 0.1


def test_one_text_without_an_axis_of_examples(tiny, tmp_path):
    config, params = lm.load_gguf(tiny().write(tmp_path / "tiny.gguf"))
    logits = lm.forward(config, params, TOKENS[0])
    expected = lm.forward(config, params, TOKENS)[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_bfloat16_computes_in_it(tiny, tmp_path):
    path = tiny("Q8_0").write(tmp_path / "tiny.gguf")
    config, params = lm.load_gguf(path, dtype=jnp.bfloat16)
    _, packed = lm.load_gguf(path, dtype=jnp.bfloat16, packed=True)
    expected = lm.forward(*lm.load_gguf(path), TOKENS)
    for values in (params, packed):
        logits = lm.forward(config, values, TOKENS)
        assert logits.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            logits.astype(jnp.float32), expected, rtol=0, atol=0.5
        )


def test_wrong_tokens_and_masks_are_refused(tiny, tmp_path):
    config, params = lm.load_gguf(tiny().write(tmp_path / "tiny.gguf"))
    with pytest.raises(TypeError, match="expected integers as tokens, got float32"):
        lm.forward(config, params, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"T >= 1, got shape \(1, 0\)"):
        lm.forward(config, params, jnp.ones((1, 0), int))
    with pytest.raises(ValueError, match="at most the context's 32 tokens, got 33"):
        lm.forward(config, params, jnp.ones((1, 33), int))
    with pytest.raises(TypeError, match="booleans as the mask, got int32"):
        lm.forward(config, params, TOKENS, mask=jnp.ones((2, 5), int))
    with pytest.raises(ValueError, match=r"shape \(2, 5\), got \(2, 4\)"):
        lm.forward(config, params, TOKENS, mask=jnp.ones((2, 4), bool))


SIZES = {
    "num_layers": 30, "width": 576, "num_heads": 9, "num_kv_heads": 3, "head_size": 64,
    "inner_width": 1536, "num_words": 49152, "context": 8192,
}  # fmt: skip


def abstract(config):
    """SmolLM2's packed parameters, as shapes: Q4_1, and Q8_0 of the embedding."""
    spec = jax.ShapeDtypeStruct

    def packed(shape):
        *lead, width = shape
        blocks = (*lead, width // 32)
        halves = spec(blocks, jnp.float16)
        return lm.Packed(spec((*blocks, 16), jnp.uint8), halves, halves)

    layers = {
        name: packed((config.num_layers, *shape))
        if len(shape) > 1
        else spec((config.num_layers, *shape), jnp.float32)
        for name, shape in config.shapes().items()
    }
    blocks = (config.num_words, config.width // 32)
    table = lm.Packed(spec((*blocks, 32), jnp.int8), spec(blocks, jnp.float16))
    gain = spec((config.width,), jnp.float32)
    return {"layers": layers, "token_embd": table, "output_norm": gain}


@pytest.mark.usefixtures("optimised")
def test_packed_weights_of_smollm2_never_stand_unpacked():
    config = lm.LlamaConfig(**SIZES)
    params = abstract(config)
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert num_bytes <= 93 * 2**20
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    run = jax.jit(lambda params, tokens: lm.forward(config, params, tokens))
    memory = run.lower(params, tokens).compile().memory_analysis()
    # One layer takes 13.5 MiB, eight tokens' logits 1.5, which are transposed once.
    assert memory.temp_size_in_bytes <= 20 * 2**20


FOLDERS = [
    os.environ.get("FORWAX_DATA"),
    os.environ.get("FORWAX_CACHE"),
    "~/.cache/forwax",
]


def real_file():
    """The real model's file where it has been fetched."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    for folder in filter(None, FOLDERS):
        for path in (Path(folder), Path(folder) / "smollm2"):
            if (path.expanduser() / name).is_file():
                return path.expanduser() / name
    pytest.skip(f"{name} is neither in FORWAX_DATA nor in the cache")


def test_the_real_model_answers_as_stored():
    path = real_file()
    config, params = lm.load_gguf(path, packed=True)
    pytest.importorskip("tokenizers")
    tokenizer = lm.load_tokenizer(path)
    run = jax.jit(lambda params, tokens: lm.forward(config, params, tokens)[-1])
    stored = {
        "The capital of France is": {7042: 17.371, 260: 14.889, 4528: 13.245},
        "The film was good. It was": {1109: 15.541, 13321: 12.067},
    }
    for text, words in stored.items():
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        logits = run(params, jnp.array(tokens))
        for word, value in words.items():
            assert abs(float(logits[word]) - value) < 2e-3
    best = run(params, jnp.array(tokenizer.encode("The capital of France is")))
    assert tokenizer.decode([int(best.argmax())]) == " Paris"
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(" made in 2024.")]
    assert pieces == [" made", " in", " ", "2", "0", "2", "4", "."]
    with pytest.raises(
        ValueError, match=r"the byte 0x04 of UTF-8, so expected a text without '\\x04'"
    ):
        tokenizer.encode("\x04")
