"""A direction as a product of two thin arrays, and what operations make of it without forming it.

The tangent of a variable is Σ_r left_r · right_r, elementwise, each factor with size 1 along axes
on which it does not depend. Moves of axes act on both factors; a dot or a convolution contracts one
of them and is then scaled by the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import Array

from forwax._directions.add import Pair, add_outer, outer
from forwax._directions.direction import Dense, Direction, RowOf, Shape, Whole

Sides: TypeAlias = tuple[Whole, Whole]


@dataclasses.dataclass(frozen=True, eq=False)
class Factored(Direction):
    """A direction in factors.

    Attributes:
        sides: pairs of factors, each of the parameter's rank; packed signs at first, later arrays.
    """

    sides: tuple[Sides, ...]

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Factored":
        """Of pairs of arrays."""
        return cls(tuple((Dense(left), Dense(right)) for left, right in pairs))

    @property
    def pairs(self) -> list[Pair]:
        """The factors as arrays."""
        return [(left.unpack(), right.unpack()) for left, right in self.sides]

    @property
    def is_thin(self) -> bool:
        """Always."""
        return True

    def after(self, known: Sequence[Array]) -> "Factored":
        """See `Direction.after`."""
        return Factored(
            tuple((left.after(known), right.after(known)) for left, right in self.sides)
        )

    def unpacked(self) -> "Factored":
        """See `Direction.unpacked`."""
        return Factored.of(self.pairs)

    def dense(self, shape: Shape) -> Array:
        """See `Direction.dense`."""
        products = [left * right for left, right in self.pairs]
        return jnp.broadcast_to(sum(products[1:], start=products[0]), shape)

    def rows(self) -> tuple[Any, RowOf]:
        """See `Direction.rows`: each factor's own."""
        slices = [(left.rows(), right.rows()) for left, right in self.sides]

        def row(parts: Any, index: Array) -> Direction:
            sides: list[Any] = []
            for (left, right), ((_, left_of), (_, right_of)) in zip(parts, slices, strict=True):
                sides.append((left_of(left, index), right_of(right, index)))
            return Factored(tuple(sides))

        return [(left, right) for (left, _), (right, _) in slices], row

    def sum(self, weights: Array, leaf: Array) -> Array:
        """See `Direction.sum`."""
        return outer(weights, self.pairs, leaf)

    def add(self, leaf: Array, weights: Array) -> Array:
        """See `Direction.add`."""
        return add_outer(leaf, weights, self.pairs)
