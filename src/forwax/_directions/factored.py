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
from forwax._directions.direction import Direction, RowOf, Shape, Unpacked, Whole
from forwax._directions.rounding import NEAREST, Rounding

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
        sides: list[Sides] = []
        for left, right in pairs:
            side = (Unpacked(left), Unpacked(right))
            sides.append(side)
        return cls(tuple(sides))

    @property
    def pairs(self) -> list[Pair]:
        """The factors as arrays."""
        pairs: list[Pair] = []
        for left, right in self.sides:
            pair = (left.unpack(), right.unpack())
            pairs.append(pair)
        return pairs

    def after(self, known: Sequence[Array]) -> "Factored":
        """See `Direction.after`."""
        sides: list[Sides] = []
        for left, right in self.sides:
            late = (left.after(known), right.after(known))
            sides.append(late)
        return Factored(tuple(sides))

    def unpacked(self) -> "Factored":
        """See `Direction.unpacked`."""
        return Factored.of(self.pairs)

    def scaled(self, factor: Array) -> "Factored":
        """See `Direction.scaled`."""
        pairs = [(left * factor, right) for left, right in self.pairs]
        return Factored.of(pairs)

    def dense(self, shape: Shape) -> Array:
        """See `Direction.dense`."""
        products = [
            left * right for left, right in self.pairs
        ]  # of the shape, up to ones
        total = sum(products[1:], start=products[0])
        return jnp.broadcast_to(total, shape)

    def rows(self) -> tuple[Any, RowOf]:
        """See `Direction.rows`: each factor's own."""
        slices: list[tuple[Any, Any]] = []
        makers: list[tuple[RowOf, RowOf]] = []
        for left, right in self.sides:
            left_slice, left_of = left.rows()
            right_slice, right_of = right.rows()
            slices.append((left_slice, right_slice))
            makers.append((left_of, right_of))

        def row(parts: Any, index: Array) -> Direction:
            sides: list[Sides] = []
            for i, (left_of, right_of) in enumerate(makers):
                left_part, right_part = parts[i]
                left = left_of(left_part, index)
                right = right_of(right_part, index)
                sides.append((left, right))
            return Factored(tuple(sides))

        return slices, row

    def sum(self, weights: Array, leaf: Array) -> Array:
        """See `Direction.sum`."""
        return outer(weights, self.pairs, leaf)

    def add(self, leaf: Array, weights: Array, rounding: Rounding = NEAREST) -> Array:
        """See `Direction.add`."""
        return add_outer(leaf, weights, self.pairs, rounding)
