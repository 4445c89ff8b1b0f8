"""A tiny model, written to a GGUF file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, CONTEXT = 3, 64, 4, 2, 96, 32
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "2 0"]


def letters() -> list[str]:
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printed else next(shifted)) for byte in range(256)]


WORDS = [*SPECIAL, *letters(), *(merge.replace(" ", "") for merge in MERGES)]


def matrices(tied: bool) -> dict[str, tuple[int, int]]:
    keys = WIDTH * KV_HEADS // HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (keys, WIDTH),
        "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    stacked = {
        f"blk.{index}.{name}.weight": shape
        for index in range(LAYERS)
        for name, shape in shapes.items()
    }
    heads = {} if tied else {"output.weight": (len(WORDS), WIDTH)}
    return {"token_embd.weight": (len(WORDS), WIDTH), **stacked, **heads}


def norms() -> list[str]:
    stacked = [
        f"blk.{index}.{name}.weight"
        for index in range(LAYERS)
        for name in ("attn_norm", "ffn_norm")
    ]
    return ["output_norm.weight", *stacked]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """What a test may change before the file is written."""

    tensors: dict[str, np.ndarray]
    kinds: dict[str, str]
    fields: dict[str, Any]
    architecture: str = "llama"

    def write(self, path: Path) -> Path:
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        adders = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
            list: writer.add_array,
        }
        for name, value in self.fields.items():
            adders[type(value)](name, value)
        for name, tensor in self.tensors.items():
            kind = gguf.GGMLQuantizationType[self.kinds.get(name, "F32")]
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Tiny]:
    def make(kind: str = "F32", *, tied: bool = True) -> Tiny:
        rng = np.random.default_rng(0)
        shapes = matrices(tied)
        tensors = {
            name: (rng.normal(size=shape) / 4).astype(np.float32)
            for name, shape in shapes.items()
        }
        gains = {
            name: rng.uniform(0.5, 1.5, WIDTH).astype(np.float32) for name in norms()
        }
        fields = {
            "llama.block_count": LAYERS,
            "llama.context_length": CONTEXT,
            "llama.embedding_length": WIDTH,
            "llama.feed_forward_length": INNER,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 1000.0,
            "general.name": "tiny",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": WORDS,
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.token_type": [
                3 if word in SPECIAL else 1 for word in WORDS
            ],
        }
        return Tiny({**tensors, **gains}, dict.fromkeys(shapes, kind), fields)

    return make
