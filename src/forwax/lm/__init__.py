"""Language models of the architecture `llama`, read from GGUF files, as JAX functions.

What reads files needs the extra `lm`, `pip install -e '.[lm]'`; `forward` and `hidden` need JAX
alone. Nothing here reaches a network.

The models are those of Touvron et al. 2023 (arXiv 2302.13971): root mean square norms, rotary
positions, SwiGLU, and the grouped heads of Ainslie et al. 2023 (arXiv 2305.13245).
"""

from forwax.lm.config import LlamaConfig
from forwax.lm.gguf_file import load_gguf
from forwax.lm.model import forward, hidden
from forwax.lm.packed import Packed
from forwax.lm.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "LlamaConfig",
    "Packed",
    "Tokenizer",
    "forward",
    "hidden",
    "load_gguf",
    "load_tokenizer",
]
