"""Random signs: the least variance of independent unbiased tangents (Spall 1992, SPSA)."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, cast

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
    drawn_twice: ClassVar[bool] = True
    planned = "signs"

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction: ±1 in each leaf's shape and dtype."""
        pairs = zip(draw_words(key, specs), specs, strict=True)
        return [unpack_signs(words, spec) for words, spec in pairs]

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n - 1) / k."""
        return (n - 1) / num_tangents


def num_words(spec: Spec) -> int:
    """How many words one leaf's signs take."""
    return -(-math.prod(spec.shape) // WORD)


def draw_words(key: Array, specs: Sequence[Spec]) -> list[Array]:
    """Random words for each leaf's signs [ceil(size / 32)], in one draw for all leaves."""
    counts = [num_words(spec) for spec in specs]
    num_drawn = padded(sum(counts))
    words = jax.random.bits(key, (num_drawn,), jnp.uint32)
    leaves: list[Array] = []
    start = 0
    for count in counts:
        stop = start + count
        leaves.append(words[start:stop])
        start = stop
    return leaves


def draws_anywhere(key: Array) -> bool:
    """Whether `words_at` knows the generator: JAX's default, with each word from key and place."""
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return False
    # A setting that JAX declares when it runs.
    return bool(getattr(jax.config, "jax_threefry_partitionable"))  # noqa: B009


def words_at(data: Array, places: Array) -> Array:
    """Those of the words of `draw_words` that stand at the given places [c], without the others.

    Args:
        data: the key's own two words, as `jax.random.key_data` returns them.
        places: uint32 [c].

    Returns:
        uint32 [c].
    """
    # The generator encrypts each place, a pair of words of which the first is 0 in short draws.
    counters = jnp.concatenate([jnp.zeros_like(places), places])
    encrypted = cast(Array, threefry_2x32((data[0], data[1]), counters))
    high, low = jnp.split(encrypted, 2)
    return high ^ low


def padded(num_words: int) -> int:
    """Up to an even number, and in whole rows for long draws.

    On CPUs an odd number of words costs four times as much.
    """
    row = _ROW if num_words > _ROW else 2
    return -(-num_words // row) * row


def unpack_signs(words: Array, spec: Spec) -> Array:
    """Signs ±1 of the given shape and dtype from the bits of uint32 words [ceil(size / 32)]."""
    shifts = jnp.arange(WORD, dtype=jnp.uint32)
    # [words, 32]: each bit in the place of a float's sign, beside the other bits of 1.0
    sign_bits = jnp.left_shift(words[:, None], shifts[None, :]) & jnp.uint32(0x80000000)
    ones = sign_bits | jnp.uint32(0x3F800000)
    signs = jax.lax.bitcast_convert_type(ones, jnp.float32)
    flat = signs.astype(spec.dtype).reshape(-1)
    return flat[: math.prod(spec.shape)].reshape(spec.shape)
