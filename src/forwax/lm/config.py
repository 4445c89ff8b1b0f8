"""What of a model is no array."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and constants of a model of the architecture `llama`.

    It is hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
        num_layers: the number of layers.
        width: the length of a token's hidden state.
        num_heads: the number of query heads.
        num_kv_heads: the number of key and value heads, each of which serves num_heads /
            num_kv_heads query heads.
        head_size: the length of a head's query, even.
        inner_width: the width of the SwiGLU between its products.
        num_words: the number of words.
        context: how many tokens the model was trained to look back on.
        rms_epsilon: what is added to the mean square in norms.
        rope_base: the base of the rotary positions' wavelengths.
        name: the model's name.
        sha256: the hash of the file from which it came, or nothing.

    Raises:
        ValueError: when a size is not positive, or the heads do not fit together.

    Example:
        >>> from forwax.lm import LlamaConfig
        >>> config = LlamaConfig(
        ...     num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_size=4, inner_width=16,
        ...     num_words=32, context=64,
        ... )
        >>> config.rope_base
        10000.0
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    inner_width: int
    num_words: int
    context: int
    rms_epsilon: float = 1e-5
    rope_base: float = 10_000.0
    name: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:8]:
            size = getattr(self, field.name)
            if size < 1:
                raise ValueError(
                    f"LlamaConfig: expected a positive {field.name}, got {size}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "LlamaConfig: expected a number of query heads that is a multiple of the number of "
                f"key heads, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_size % 2:
            raise ValueError(
                "LlamaConfig: rotary positions turn pairs of entries, so expected heads of an "
                f"even size, got {self.head_size}."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of a layer's arrays, by its name in the file: matrices [out, in]."""
        width = self.width
        inner = self.inner_width
        queries = self.num_heads * self.head_size
        keys = self.num_kv_heads * self.head_size
        return {
            "attn_norm": (width,),
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, queries),
            "ffn_norm": (width,),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
