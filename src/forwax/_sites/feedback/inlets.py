"""Where learned errors are handed back: the data that products with parameters take.

An *inlet* is the data input of one product or of several that share it; an *outlet* is where the
exact error of the last products is taken. Reverse mode is cut at every inlet, and a map from the
outlets' errors brings the inlet's error in its place.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from forwax import _mesh, _tree
from forwax._programs.program import Equation, Variable
from forwax._sites.feedback.crossing import Mirror, WayBack
from forwax._sites.levels import Level
from forwax._sites.model import Sites
from forwax._sites.outputs import Tail
from forwax._tree import Spec

Numbers = Mapping[Equation, Mapping[Variable, int]]
"""For each product the inlets that it takes, by the variable that it reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outlet:
    """Where the exact error is taken: a last site's value, its data, or what these are made of.

    Attributes:
        variable: the value.
        start: the variable of the tail that stands for it.
        shape: of one example.
        dtype: of the value.
        reach: the losses that it reaches, as a bit mask.
        crossed: the last products, where it stands in front of them, and what lies between.
    """

    variable: Variable
    start: Variable
    shape: tuple[int, ...]
    dtype: Any
    reach: int
    crossed: frozenset[Equation] = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Inlet:
    """What a product takes, or several products.

    Attributes:
        variable: the value.
        products: the operations that read it.
        shape: of one example, with a leading axis for each loop around it.
        dtype: of the value.
        mapped: whether each example has a value of its own.
        axes: the mesh axes over which it varies.
        heard: the numbers of the outlets that it reaches.
        common: the axes that it has in common with all of these: its own axis, and that of each
            outlet. One map serves all positions along them.
    """

    variable: Variable
    products: tuple[Equation, ...]
    shape: tuple[int, ...]
    dtype: Any
    mapped: bool
    axes: _mesh.Axes
    heard: tuple[int, ...] = ()
    common: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def spec(self) -> Spec:
        """Shape and dtype of one example's value."""
        return Spec(self.shape, self.dtype)

    @property
    def own_axes(self) -> list[int]:
        """Its side of the common axes."""
        return [axis for axis, _ in self.common]

    @property
    def heard_axes(self) -> list[list[int]]:
        """For each outlet that it hears the outlet's side of the common axes."""
        sides: list[list[int]] = []
        for place in range(len(self.heard)):
            axes = [of_outlets[place] for _, of_outlets in self.common]
            sides.append(axes)
        return sides

    @property
    def num_positions(self) -> int:
        """The number of positions that share its map."""
        return math.prod(self.shape[axis] for axis in self.own_axes)

    @property
    def size(self) -> int:
        """The number h of real coordinates at one position."""
        return _tree.num_coordinates(self.spec) // self.num_positions


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """A problem's sites with the ways of its errors.

    Attributes:
        sites: the problem's sites; the last ones are exact.
        inlets: in the program's order.
        outlets: in the program's order.
        tail: from the outlets to the losses.
        numbers: the inlets of each product that is cut.
        mirrors: the weights that the other products' errors cross through their twins.
        chained: these products.
    """

    sites: Sites
    inlets: tuple[Inlet, ...]
    outlets: tuple[Outlet, ...]
    tail: Tail
    numbers: Numbers
    mirrors: tuple[Mirror, ...] = ()
    chained: frozenset[Equation] = frozenset()

    @property
    def num_lead(self) -> int:
        """The number of leading axes of what each example has: its own, or none."""
        return 0 if self.sites.num_examples is None else 1

    def heard_sizes(self, inlet: Inlet) -> list[int]:
        """For each outlet that an inlet hears the real coordinates at one position."""
        sizes: list[int] = []
        for number in inlet.heard:
            whole = _tree.num_coordinates(self.outlets[number])
            sizes.append(whole // inlet.num_positions)
        return sizes

    def way_back(self, mirrors: Sequence[Array] = ()) -> WayBack:
        """How the reverse pass goes: cut at all inlets, through the mirrors elsewhere."""
        # A pass that pushes noise crosses the weights themselves, and is given no mirrors.
        variables = [mirror.variable for mirror in self.mirrors]
        twins = dict(zip(variables, mirrors, strict=bool(mirrors)))
        return WayBack(
            self.sites.products,
            self.numbers,
            self.chained.__contains__,
            twins,
            self.mirrors,
        )


def lengths_around(
    level: Level, around: tuple[int, ...] = ()
) -> dict[Equation, tuple[int, ...]]:
    """For each equation the lengths of the loops around it, outermost first."""
    lengths: dict[Equation, tuple[int, ...]] = {}
    for equation in level.program.equations:
        lengths[equation] = around
        plan = level.loop_of(equation)
        if plan is not None:
            lengths |= lengths_around(plan.level, (*around, plan.loop.length))
    return lengths
