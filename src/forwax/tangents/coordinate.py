"""Coordinate directions √n · e_i: forward-mode random coordinate descent."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
from jax import Array

from forwax import _mesh, _tree
from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coordinate(IndependentTangents):
    """One coordinate direction √n · e_i per tangent, i uniform over the real coordinates.

    Relative MSE of the mean over k tangents: (n - 1) / k with replacement, n/k - 1 without (exact
    at k = n).

    Attributes:
        replace: whether one coordinate can be drawn twice in a call.

    Raises:
        ValueError: without replacement, when k > n.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> coordinates = fx.tangents.Coordinate(replace=False)
        >>> v = coordinates.sample(jax.random.key(0), jnp.zeros(4), num_tangents=4)
        >>> v.sum(axis=0).tolist()
        [2.0, 2.0, 2.0, 2.0]
    """

    replace: bool = dataclasses.field(default=True, metadata={"static": True})
    has_zeros: ClassVar[bool] = True

    def check(self, n: int, num_tangents: int) -> None:
        """Raise a ValueError without replacement when k > n."""
        if not self.replace:
            check_at_most(num_tangents, n, "Coordinate(replace=False)")

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction: √n · e_i."""
        n = _tree.count(specs)
        return _tree.basis(jax.random.randint(key, (), 0, n), specs, math.sqrt(n))

    def draw_at(
        self,
        key: Array,
        specs: Sequence[Spec],
        indices: Array,
    ) -> list[Array]:
        """Draw the directions of the given indices.

        Without replacement they are those of a permutation that the key fixes.
        """
        if self.replace:
            return super().draw_at(key, specs, indices)
        n = _tree.count(specs)
        permutation = jax.random.permutation(key, n)
        # JAX forgets over which mesh axes a permutation varies.
        order = _mesh.vary(permutation, _mesh.axes(key))
        # The indices of a call count up, so that no coordinate comes twice.
        chosen = order[indices]

        def draw(index: Array) -> list[Array]:
            return _tree.basis(index, specs, math.sqrt(n))

        return jax.vmap(draw)(chosen)

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n - 1) / k with replacement, n/k - 1 without."""
        if self.replace:
            return (n - 1) / num_tangents
        return n / num_tangents - 1


def check_at_most(num_tangents: int, n: int, name: str) -> None:
    """Raise a ValueError for more orthogonal directions than there are coordinates."""
    if num_tangents > n:
        raise ValueError(
            f"tangents.{name} draws at most n = {n} directions for {n} real coordinates, got "
            f"num_tangents={num_tangents}. With num_tangents={n} the gradient is exact already."
        )
