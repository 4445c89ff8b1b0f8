"""Sparse signs: most coordinates stay where they are."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(IndependentTangents):
    """Independent entries, ±1/√p with probability p and 0 otherwise; p is rounded to a multiple of 2⁻³¹.

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

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"tangents.Sparse: expected a density in (0, 1], got {self.density}.")

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction: sparse signs in each leaf's shape and dtype."""
        keys = jax.random.split(key, len(specs))
        return [self._leaf(k, spec) for k, spec in zip(keys, specs, strict=True)]

    def _leaf(self, key: Array, spec: Spec) -> Array:
        # One draw serves both choices: of 2³² words the first 2h keep the entry, and the first h
        # make it positive.
        bits = jax.random.bits(key, spec.shape, jnp.uint32)
        half, size = self._half, math.sqrt(2**31 / self._half)
        sign = jnp.where(bits < jnp.uint32(half), size, -size)
        return jnp.where(bits <= jnp.uint32(2 * half - 1), sign, 0.0).astype(spec.dtype)

    @property
    def _half(self) -> int:
        """Half of p · 2³²: what is drawn has exactly this density, so that E[v vᵀ] = I whatever p is."""
        return max(1, round(self.density * 2**31))

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n + 1/p - 2) / k."""
        return (n + 1 / self.density - 2) / num_tangents
