"""Signs that are orthogonal to each other: rows of a Walsh-Hadamard matrix times random signs."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents
from forwax.tangents.coordinate import check_at_most
from forwax.tangents.rademacher import Rademacher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hadamard(IndependentTangents):
    """k directions of signs ±1, orthogonal to each other in aligned blocks of coordinates.

    A block has B = 2^⌈log₂ k⌉ coordinates. Direction j has the entry d_i (-1)^|i & j| at coordinate
    i, counted over all leaves: one random sign d_i, which all directions share, and the parity of
    the bits that i and j have in common (Walsh's functions). A single direction is that of
    `Rademacher`. Relative MSE of the mean over k tangents: n/k - 1 where B divides n, as for
    `Orthonormal`, but without a factorisation and with the random bits of one direction; with
    r = n mod B coordinates left over at most r (k - 1)/k more.

    Orthogonality holds within a part of the coordinates as well, such as the activities of one
    example and group, if it begins and ends at multiples of B.

    Raises:
        ValueError: when k > n.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> v = fx.tangents.Hadamard().sample(jax.random.key(0), jnp.zeros(8), num_tangents=4)
        >>> (v @ v.T).tolist() == (8 * jnp.eye(4)).tolist(), float(jnp.abs(v).min())
        (True, 1.0)
    """

    coordinatewise: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def check(self, n: int, num_tangents: int) -> None:
        """Raise a ValueError when k > n."""
        check_at_most(num_tangents, n, "Hadamard()")

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw the first direction: the shared signs."""
        return Rademacher().draw_one(key, specs)

    def draw_at(
        self,
        key: Array,
        specs: Sequence[Spec],
        indices: Array,
    ) -> list[Array]:
        """Draw the directions of the given indices [c]."""
        shared = self.draw_one(jax.random.fold_in(key, 0), specs)
        leaves: list[Array] = []
        start = 0
        for signs, spec in zip(shared, specs, strict=True):
            # [1, *shape] * [c, *shape]
            shared_signs = signs[None]
            leaves.append(
                shared_signs * _walsh(indices, start, spec).astype(spec.dtype)
            )
            start += math.prod(spec.shape)
        return leaves

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """n/k - 1."""
        return n / num_tangents - 1


def _walsh(indices: Array, start: int, spec: Spec) -> Array:
    """(-1)^|i & j| for directions j [c] and the coordinates i of a leaf: float32 [c, *shape]."""
    positions = start + jnp.arange(math.prod(spec.shape), dtype=jnp.uint32)
    common = indices.astype(jnp.uint32)[:, None] & positions[None, :]
    # Two rows differ at as many coordinates of a block as they agree at: they are orthogonal.
    parity = jax.lax.population_count(common) & 1
    signs = 1 - 2 * parity.astype(jnp.float32)
    return signs.reshape(indices.size, *spec.shape)
