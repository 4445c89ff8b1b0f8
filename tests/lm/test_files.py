"""What a file must be."""

import dataclasses
import importlib.metadata
import re

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("gguf")

from forwax import lm


def test_truncated_and_foreign_files_are_refused(tiny, tmp_path):
    path = tiny("Q4_0").write(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in (0, 3, 20, 500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"expected a whole GGUF file, but .*tiny\.gguf"
        ):
            lm.load_gguf(path)
    path.write_bytes(b"a text about something else " * 100)
    with pytest.raises(ValueError, match="is foreign or truncated"):
        lm.load_gguf(path)
    with pytest.raises(FileNotFoundError, match=r"expected a GGUF file at .*none"):
        lm.load_gguf(tmp_path / "none")


def test_another_architecture_is_refused(tiny, tmp_path):
    other = dataclasses.replace(tiny(), architecture="qwen2")
    with pytest.raises(ValueError, match="architecture llama, got qwen2"):
        lm.load_gguf(other.write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    "name", ["blk.1.attn_q.weight", "token_embd.weight", "output_norm.weight"]
)
def test_a_missing_tensor_is_named(name, tiny, tmp_path):
    model = tiny()
    del model.tensors[name]
    with pytest.raises(
        ValueError, match=rf"the tensor {name} \[.*which the file lacks"
    ):
        lm.load_gguf(model.write(tmp_path / "tiny.gguf"))


def test_a_tensor_that_nothing_would_use_is_refused(tiny, tmp_path):
    model = tiny()
    model.tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"got these too: rope_freqs\.weight"):
        lm.load_gguf(model.write(tmp_path / "tiny.gguf"))


def test_another_shape_is_refused(tiny, tmp_path):
    model = tiny()
    model.tensors["blk.2.ffn_up.weight"] = np.ones((32, 64), np.float32)
    with pytest.raises(
        ValueError, match=r"blk\.2\.ffn_up\.weight to be \[96, 64\], got \[32, 64\]"
    ):
        lm.load_gguf(model.write(tmp_path / "tiny.gguf"))


def test_a_missing_field_is_named(tiny, tmp_path):
    model = tiny()
    del model.fields["llama.block_count"]
    with pytest.raises(ValueError, match=r"expected the field llama\.block_count"):
        lm.load_gguf(model.write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("llama.rope.scaling.type", "linear", "to be none, got linear"),
        ("llama.rope.dimension_count", 8, "to be 16, got 8"),
        ("llama.attention.value_length", 8, "to be 16, got 8"),
        ("llama.expert_count", 4, "to be 0, got 4"),
        ("llama.attention.head_count_kv", 3, "got 4 and 3"),
        ("llama.block_count", 0, "expected a positive num_layers, got 0"),
    ],
)
def test_what_the_forward_pass_lacks_is_refused(name, value, text, tiny, tmp_path):
    model = tiny()
    model.fields[name] = value
    with pytest.raises(ValueError, match=text):
        lm.load_gguf(model.write(tmp_path / "tiny.gguf"))


def test_an_odd_head_is_refused(tiny, tmp_path):
    model = tiny()
    model.fields["llama.attention.key_length"] = 15
    model.fields["llama.attention.value_length"] = 15
    with pytest.raises(ValueError, match="heads of an even size, got 15"):
        lm.load_gguf(model.write(tmp_path / "tiny.gguf"))


def test_packed_layers_of_two_types_are_refused(tiny, tmp_path):
    model = tiny("Q4_0")
    model.kinds["blk.1.attn_v.weight"] = "Q8_0"
    path = model.write(tmp_path / "tiny.gguf")
    with pytest.raises(
        ValueError, match="one type for attn_v in all layers, got Q4_0, Q8_0"
    ):
        lm.load_gguf(path, packed=True)
    assert lm.load_gguf(path)[1]["layers"]["attn_v"].shape == (3, 32, 64)


def test_a_dtype_that_is_not_floating_is_refused(tmp_path):
    with pytest.raises(TypeError, match="floating dtype, got"):
        lm.load_gguf(tmp_path / "tiny.gguf", dtype=jnp.int32)


def test_the_name_and_the_hash_are_the_files(tiny, tmp_path):
    import hashlib

    path = tiny().write(tmp_path / "tiny.gguf")
    config, _ = lm.load_gguf(path)
    assert config.name == "tiny"
    assert config.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_neither_transformers_nor_torch_is_needed():
    needed = importlib.metadata.requires("forwax") or []
    of_lm = [x for x in needed if re.search(r"extra == .lm.", x)]
    names = {re.match(r"[\w-]+", x)[0] for x in of_lm}
    assert {"gguf", "safetensors", "tokenizers"} <= names
    assert not names & {"torch", "transformers"}
