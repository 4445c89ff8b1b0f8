"""What a direction of one parameter can do, be it an array, packed signs or thin factors."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jax import Array

from forwax._directions.add import add_outer, as_pair, outer
from forwax._directions.rounding import NEAREST, Rounding

Shape: TypeAlias = tuple[int, ...]

RowOf: TypeAlias = Callable[[Any, Array], Any]
"""Takes what a scan sliced of a direction, and the step's index, to the direction of that step."""


class Direction(abc.ABC):
    """A tangent of one parameter or, with further axes in front, several of them."""

    @abc.abstractmethod
    def after(self, known: Sequence[Array]) -> "Direction":
        """The same, its signs known only when something else is: else they are unpacked early."""

    @abc.abstractmethod
    def unpacked(self) -> "Direction":
        """The same, made of arrays alone."""

    @abc.abstractmethod
    def scaled(self, factor: Array) -> "Direction":
        """The same, made of arrays, times a factor that broadcasts to the parameter's shape."""

    @abc.abstractmethod
    def dense(self, shape: Shape) -> Array:
        """The one tangent itself, of the parameter's shape."""

    @abc.abstractmethod
    def rows(self) -> tuple[Any, RowOf]:
        """What a scan over the first axis slices, None for nothing, and what a step makes of it."""

    @abc.abstractmethod
    def sum(self, weights: Array, leaf: Array) -> Array:
        """Σ c v over the leading axes, those of the weights, in at least float32."""

    @abc.abstractmethod
    def add(self, leaf: Array, weights: Array, rounding: Rounding = NEAREST) -> Array:
        """The leaf + Σ c v, in place where it is donated: the sum is not held."""


class Whole(Direction):
    """A direction that is not in factors."""

    @abc.abstractmethod
    def unpack(self) -> Array:
        """The array that it stands for."""

    @abc.abstractmethod
    def after(self, known: Sequence[Array]) -> "Whole":
        """See `Direction.after`."""

    @abc.abstractmethod
    def __mul__(self, scale: float) -> "Whole":
        """The direction times a number."""

    def unpacked(self) -> "Unpacked":
        """See `Direction.unpacked`."""
        return Unpacked(self.unpack())

    def scaled(self, factor: Array) -> "Unpacked":
        """See `Direction.scaled`."""
        return Unpacked(self.unpack() * factor)

    def dense(self, shape: Shape) -> Array:
        """See `Direction.dense`."""
        return self.unpack()


@dataclasses.dataclass(frozen=True, eq=False)
class Unpacked(Whole):
    """A direction that is an array.

    Attributes:
        value: the array.
    """

    value: Array

    def __mul__(self, scale: float) -> "Unpacked":
        return Unpacked(self.value * scale)

    def after(self, known: Sequence[Array]) -> "Unpacked":
        """Itself: there is nothing to unpack."""
        return self

    def unpack(self) -> Array:
        """The array."""
        return self.value

    def rows(self) -> tuple[Any, RowOf]:
        """See `Direction.rows`; a single row serves all steps."""
        if (
            self.value.shape[0] == 1
        ):  # a factor that does not depend on the scanned axis
            only = Unpacked(self.value[0])
            return None, lambda _, index: only
        return self.value, lambda row, index: Unpacked(row)

    def sum(self, weights: Array, leaf: Array) -> Array:
        """See `Direction.sum`."""
        return outer(weights, [as_pair(self.value)], leaf)

    def add(self, leaf: Array, weights: Array, rounding: Rounding = NEAREST) -> Array:
        """See `Direction.add`."""
        return add_outer(leaf, weights, [as_pair(self.value)], rounding)
