"""Sparse signs: most coordinates stay where they are."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from forwax._checks import register_checked
from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents, draw_in_one_axis


@register_checked
@dataclasses.dataclass(frozen=True)
class Sparse(IndependentTangents):
    """Independent entries, ±1/√p with probability p and 0 otherwise.

    The probability is rounded to a multiple of 2⁻³¹.
    Relative MSE of the mean over k tangents: (n + 1/p - 2) / k (kurtosis 1/p).

    Attributes:
        density: the probability p in (0, 1] that an entry is not zero.

    Raises:
        ValueError: when the density is not in (0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> v = fx.tangents.Sparse(density=0.25).sample(jax.random.key(0), jnp.zeros(1000))
        >>> sorted(set(v.ravel().tolist()))
        [-2.0, 0.0, 2.0]
    """

    density: float = dataclasses.field(metadata={"static": True})
    coordinatewise: ClassVar[bool] = True
    drawn_twice: ClassVar[bool] = True
    has_zeros: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(
                f"tangents.Sparse: expected a density in (0, 1], got {self.density}."
            )

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction: sparse signs in each leaf's shape and dtype."""
        keys = jax.random.split(key, len(specs))
        pairs = zip(keys, specs, strict=True)
        return [self._leaf(leaf_key, spec) for leaf_key, spec in pairs]

    def _leaf(self, key: Array, spec: Spec) -> Array:
        # One draw serves both choices: of 2³² words the first 2h keep the entry, and the first h
        # make it positive.
        bits = draw_in_one_axis(jax.random.bits, key, spec.shape, jnp.uint32)
        half = self._half
        size = math.sqrt(2**31 / half)
        sign = jnp.where(bits < jnp.uint32(half), size, -size)
        # 2h itself need not fit in 32 bits: with density 1 it is 2³².
        is_kept = bits <= jnp.uint32(2 * half - 1)
        return jnp.where(is_kept, sign, 0.0).astype(spec.dtype)

    @property
    def _half(self) -> int:
        """Half of p · 2³²: exactly the density that is drawn, so that E[v vᵀ] = I for every p."""
        return max(1, round(self.density * 2**31))

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n + 1/p - 2) / k."""
        return (n + 1 / self.density - 2) / num_tangents
