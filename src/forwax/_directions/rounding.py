"""How sums in float32 become parameters in half precision: to the nearest, or by chance.

Rounded by chance a number goes to one of its two neighbours, to the nearer one more often, so that
its mean is the number itself: steps that are far smaller than the spacing of the floats move
parameters as far, on average, as in float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

_WORD = 32
_DROPPED = {"bfloat16": 16, "float16": 13}
"""How many of float32's bits a type has not."""

_EXPONENTS = 0x7F800000
_START = 0x5BD1E995
"""Bits of their own: not those that a tangent's signs are drawn from."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rounding:
    """How float32 is rounded.

    Attributes:
        seed: a word from which the bits of each entry follow by its place; None for the nearest.
    """

    seed: Array | None = None

    @classmethod
    def by_chance(cls, keys: Array) -> "Rounding":
        """Of one typed key, or of several [s]."""
        data = jax.random.key_data(keys.reshape(-1))  # [s, words]
        num_keys, num_words = data.shape
        seeds = jnp.full(num_keys, _START, jnp.uint32)
        for i in range(num_words):
            seeds = _mixed(seeds ^ data[:, i])
        if num_keys == 1:
            return cls(seeds[0])
        # Each by its place, so that the same key twice is not the same as none.
        places = jnp.arange(num_keys, dtype=jnp.uint32)
        total = jnp.sum(_mixed(seeds + places), dtype=jnp.uint32)
        return cls(_mixed(total))

    def of(self, number: int | Array) -> "Rounding":
        """That of one leaf, or of one pass over all of them."""
        if self.seed is None:
            return self
        word = jnp.asarray(number).astype(jnp.uint32)
        seed = _mixed(self.seed)
        return Rounding(_mixed(seed ^ word))

    def cast(self, total: Array, dtype: Any, offset: int | Array = 0) -> Array:
        """A sum in a parameter's type.

        Args:
            total: the sum, or a block of it that lies in one piece.
            dtype: the parameter's type.
            offset: the place in the parameter of the block's first entry.
        """
        num_bits = _DROPPED.get(str(jnp.dtype(dtype)))
        is_float32 = total.dtype == jnp.float32
        if self.seed is None or num_bits is None or not is_float32:
            return total.astype(dtype)
        words = self._words(total.shape, offset)
        drawn = words >> (_WORD - num_bits)
        if num_bits == _DROPPED["bfloat16"]:  # the same exponents as float32
            return _rounded(total, drawn, num_bits).astype(dtype)
        # Subnormal numbers have the spacing of the smallest normal ones: rounded among these.
        least = float(jnp.finfo(dtype).smallest_normal)
        is_small = jnp.abs(total) < least
        moved = jnp.where(
            is_small,
            jnp.copysign(least, total),
            0,
        )
        rounded = _rounded(total + moved, drawn, num_bits)
        return (rounded - moved).astype(dtype)

    def _words(self, shape: tuple[int, ...], offset: int | Array) -> Array:
        """A random word for each entry, by its place alone: none is held."""
        assert self.seed is not None
        # Places are made anew in each pass: taken out of a loop they would be held.
        one = jnp.uint32(1)
        seed, one = lax.optimization_barrier((self.seed, one))
        start = jnp.asarray(offset).astype(jnp.uint32)
        places = jnp.broadcast_to(start, shape)
        for axis in range(len(shape)):
            size = math.prod(shape[axis + 1 :])
            stride = one * jnp.uint32(size % 2**_WORD)
            along = lax.broadcasted_iota(jnp.uint32, shape, axis)
            places = places + along * stride
        once = _mixed(places ^ seed)
        other = _mixed(seed + one)
        return _mixed(once + other)


NEAREST = Rounding()


def _rounded(total: Array, drawn: Array, num_bits: int) -> Array:
    """A float32 without its last bits, after random ones were added to them."""
    words = lax.bitcast_convert_type(total, jnp.uint32)
    mask = jnp.uint32(2**_WORD - 2**num_bits)
    kept = (words + drawn) & mask
    exponents = jnp.uint32(_EXPONENTS)
    is_finite = (words & exponents) != exponents
    chosen = jnp.where(is_finite, kept, words)
    return lax.bitcast_convert_type(chosen, jnp.float32)


def _mixed(word: Array) -> Array:
    """Each word as another one that looks random: Wellons' lowbias32 (2018), a bijection."""
    word = word ^ (word >> 16)
    word = word * jnp.uint32(0x7FEB352D)
    word = word ^ (word >> 15)
    word = word * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
