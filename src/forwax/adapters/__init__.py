"""Small sets of trained arrays beside a frozen language model of `forwax.lm`.

What is trained are an adapter's leaves; scales and fixed factors are none. A step at the start
leaves the model's logits as they are. The frozen model is an argument of the loss, the adapter its
parameters: any rule takes them.
"""

from forwax.adapters.files import load, save
from forwax.adapters.last_token import LastTokenAdapter, last_token
from forwax.adapters.lora import LoraAdapter, lora, merge
from forwax.adapters.prefix import Prefix, cached_prefix

__all__ = [
    "LastTokenAdapter",
    "LoraAdapter",
    "Prefix",
    "cached_prefix",
    "last_token",
    "load",
    "lora",
    "merge",
    "save",
]
