"""Random signs: the least variance that independent unbiased tangents can have (Spall 1992, SPSA)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry_2x32

from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents

WORD = 32
_ROW = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rademacher(IndependentTangents):
    """Independent signs ±1, 32 of them unpacked from each random uint32.

    Relative MSE of the mean over k tangents: (n - 1) / k. No distribution of independent unbiased
    tangents has less, since E|v|⁴ ≥ (E|v|²)² = n² with equality exactly when |v|² is constant.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> v = fx.tangents.Rademacher().sample(jax.random.key(0), jnp.zeros(1000), num_tangents=2)
        >>> v.shape, float(jnp.abs(v).min()), float(jnp.abs(v).max())
        ((2, 1000), 1.0, 1.0)
        >>> fx.tangents.Rademacher().relative_mse(n=101, num_tangents=4)
        25.0
    """

    coordinatewise: ClassVar[bool] = True

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction: ±1 in each leaf's shape and dtype."""
        return [
            unpack_signs(words, spec)
            for words, spec in zip(draw_words(key, specs), specs, strict=True)
        ]

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n - 1) / k."""
        return (n - 1) / num_tangents


def num_words(spec: Spec) -> int:
    """How many words one leaf's signs take."""
    return -(-math.prod(spec.shape) // WORD)


def draw_words(key: Array, specs: Sequence[Spec]) -> list[Array]:
    """Random words for each leaf's signs [ceil(size / 32)], in one draw for all leaves."""
    counts = list(map(num_words, specs))
    words = jax.random.bits(key, (_padded(sum(counts)),), jnp.uint32)
    leaves, start = [], 0
    for count in counts:
        leaves.append(words[start : start + count])
        start += count
    return leaves


def draws_anywhere(key: Array) -> bool:
    """Whether `words_at` knows the generator: JAX's default, which makes each word from the key and its place."""
    return str(jax.random.key_impl(key)) == "threefry2x32" and bool(
        jax.config.jax_threefry_partitionable
    )  # type: ignore[attr-defined]


def words_at(data: Array, places: Array) -> Array:
    """Those of the words that `draw_words` draws which stand at the given places [c], uint32, without the others.

    Args:
        data: the key's own two words, as `jax.random.key_data` returns them.
        places: uint32 [c].
    """
    high, low = jnp.split(
        threefry_2x32((data[0], data[1]), jnp.concatenate([jnp.zeros_like(places), places])),
        2,
    )
    return high ^ low


def _padded(num_words: int) -> int:
    """Up to an even number, in whole rows for long draws: on CPU an odd number of words costs four times as much."""
    row = _ROW if num_words > _ROW else 2
    return -(-num_words // row) * row


def unpack_signs(words: Array, spec: Spec) -> Array:
    """Signs ±1 of the given shape and dtype from the bits of uint32 words [ceil(size / 32)]."""
    shifts = jnp.arange(WORD, dtype=jnp.uint32)
    bits = jnp.left_shift(words[:, None], shifts[None, :]) & jnp.uint32(0x80000000)
    signs = jax.lax.bitcast_convert_type(
        bits | jnp.uint32(0x3F800000), jnp.float32
    )  # the bits of 1.0 with this sign
    return signs.astype(spec.dtype).reshape(-1)[: math.prod(spec.shape)].reshape(spec.shape)
