"""Sites and the regions around them: from where a parameter meets data to where noise enters.

A region has one exit, so that noise there reaches all that its parameters reach. A site alone is a
region; a bias or a gain that follows, or a second site added to it, joins it as long as nothing
else reads what lies between; a noise point makes everything between a site and the mark one region.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from forwax._programs.dataflow import Reach, equation_reach
from forwax._programs.program import (
    Equation,
    Program,
    Variable,
    is_inexact,
    variables,
)
from forwax._sites.kinds import Kind
from forwax._sites.noise_point import NOISE_POINT
from forwax._sites.products import Products


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """The operations between parameters and one noise.

    Attributes:
        equations: in the program's order.
        outputs: where the noise enters; one, unless a custom operation returns several.
    """

    equations: tuple[Equation, ...]
    outputs: tuple[Variable, ...]

    @property
    def inputs(self) -> list[Variable]:
        """The variables that come from outside."""
        inner: set[Variable] = set()
        read: list[Variable] = []
        for equation in self.equations:
            inner.update(equation.outputs)
            read += equation.variables
        return [v for v in dict.fromkeys(read) if v not in inner]

    @property
    def promoted(self) -> bool:
        """Whether this is a parameter with a noise of its own: weight noise."""
        return all(equation.primitive is None for equation in self.equations)


@dataclasses.dataclass
class _Growing:
    """A region that may still grow.

    Attributes:
        equations: what belongs to it.
        pending: what follows, moves above all: they count once a site or another region joins.
    """

    equations: list[Equation]
    pending: list[Equation]


class _Reader:
    """What the search asks about a program's variables."""

    def __init__(
        self,
        program: Program,
        products: Products,
        reach: Reach,
        types: Sequence[Any],
    ) -> None:
        self.products = products
        self.kinds = products.kinds
        self.reach = reach
        self.types = types
        # What reaches no loss does not count: noise there changes nothing.
        self.uses: Counter[Variable] = Counter()
        for equation in program.equations:
            if self.is_live(equation) and not equation.facts.stops_derivatives:
                self.uses.update(equation.variables)
        self.uses.update(v for v in variables(program.outputs) if reach[v])

    def is_live(self, equation: Equation) -> bool:
        return equation_reach(equation, self.reach) != 0

    def takes_parameter(self, equation: Equation) -> bool:
        return any(self.kinds[v] is Kind.PARAMETER for v in equation.variables)

    def noisy(self, equation: Equation) -> tuple[Variable, ...]:
        outputs = equation.outputs
        return tuple(v for v in outputs if self.kinds[v] is Kind.MIXED)

    def is_mixed(self, equation: Equation) -> bool:
        return len(self.noisy(equation)) > 0

    def is_site(self, equation: Equation) -> bool:
        """Whether a parameter meets data here."""
        if equation.loop is not None:
            return False
        return self.is_mixed(equation) and self.takes_parameter(equation)

    def is_even(self, equation: Equation) -> bool:
        """Whether all operands are variables of the result's size."""
        sizes = [self.size(v) for v in (*equation.variables, *equation.outputs)]
        return len(equation.variables) == len(equation.inputs) and len(set(sizes)) == 1

    def size(self, variable: Variable) -> int:
        return math.prod(self.types[variable].shape)


def find_regions(
    program: Program,
    products: Products,
    reach: Reach,
    types: Sequence[Any],
) -> list[Region]:
    """The regions at one level of a program; bodies of loops are levels of their own."""
    reader = _Reader(program, products, reach, types)
    regions = _marked_regions(program, reader)
    marked: set[Equation] = set()
    for region in regions:
        marked.update(region.equations)
    growing: list[_Growing] = []
    ends: dict[Variable, _Growing] = {}
    merging = _merging(program, reader, marked)
    for equations in merging.values():
        marked.update(equations)
    for equation in program.equations:
        if equation in marked or equation.loop is not None:
            continue
        if equation in merging:
            region = _Growing([*merging[equation], equation], [])
            growing.append(region)
            ends[equation.outputs[0]] = region
            continue
        if reader.is_mixed(equation):
            _grow(equation, reader, growing, ends)

    order = {equation: i for i, equation in enumerate(program.equations)}
    for grown in growing:
        equations = sorted(grown.equations, key=order.__getitem__)
        exits = reader.noisy(equations[-1])
        regions.append(Region(tuple(equations), exits))
    return sorted(regions, key=lambda region: order[region.equations[-1]])


def _grow(
    equation: Equation,
    reader: _Reader,
    growing: list[_Growing],
    ends: dict[Variable, _Growing],
) -> None:
    """Let an equation join the regions that end in its inputs, start a region, or end them."""
    # Only what nothing else reads may lie inside, so that the region keeps one exit.
    carried = [v for v in equation.variables if v in ends and reader.uses[v] == 1]
    joining: list[_Growing] = []
    if carried and _may_join(equation, reader, carried):
        joining = [ends[v] for v in carried]
    is_site = reader.is_site(equation)
    if not joining and not is_site:
        return

    if len(joining) == 1 and not is_site:
        region = joining[0]
        region.pending.append(equation)
    else:
        region = _Growing([], [])
        for part in joining:
            growing.remove(part)
            region.equations += part.equations + part.pending
        region.equations.append(equation)
        growing.append(region)
    # Weight noise stays where it is: behind what follows it would be activity noise.
    if len(equation.outputs) == 1 and equation.primitive is not None:
        ends[equation.outputs[0]] = region


def _may_join(equation: Equation, reader: _Reader, carried: list[Variable]) -> bool:
    """Whether noise may move from behind these inputs to behind the equation.

    It must not become larger: an estimate's variance grows with the number of coordinates.
    """
    if len(equation.outputs) != 1:
        return False
    result = equation.outputs[0]
    if not all(reader.size(v) == reader.size(result) for v in carried):
        return False
    if not equation.facts.scaled:
        return equation.facts.passed_by_regions
    # A gain: the other factor is a parameter, or, where a norm's gain meets 1 / σ first, the data
    # to be normalised; of these as many are kept as there are activities.
    scaled = [equation.inputs[i] for i in equation.facts.scaled]
    is_gain = len(carried) == 1 and carried[0] in scaled
    return is_gain and (reader.takes_parameter(equation) or reader.is_even(equation))


def _merging(
    program: Program, reader: _Reader, marked: set[Equation]
) -> dict[Equation, list[Equation]]:
    """The products of which a merged weight is read by nothing else, with what makes the weight.

    Noise behind such a product is no larger than it would be at the weight.
    """
    merging: dict[Equation, list[Equation]] = {}
    for product in program.equations:
        weights = reader.products.weights(product)
        if product in marked or not product.facts.bilinear or len(weights) != 1:
            continue
        (weight,) = weights
        if weight not in reader.products.merged or reader.uses[weight] != 1:
            continue
        if not reader.is_mixed(product):
            continue
        if reader.size(product.outputs[0]) > reader.size(weight):
            continue

        def may_lie_inside(equation: Equation) -> bool:
            if equation in marked or not _may_lie_inside(equation, reader):
                return False
            facts = equation.facts
            made = reader.products.merged.issuperset(reader.noisy(equation))
            # entry by entry, or moves: a sum along an axis might be a layer written out
            is_chain = facts.passed_by_regions or facts.elementwise_for_regions
            is_move = facts.looks_up or facts.move_of_factors is not None
            return made and (is_chain or is_move)

        equations = _before([weight], program, reader, may_lie_inside)
        if equations:
            merging[product] = equations
    return merging


def _marked_regions(program: Program, reader: _Reader) -> list[Region]:
    regions: list[Region] = []
    for mark in program.equations:
        if not _is_mark(mark) or not reader.is_mixed(mark):
            continue
        equations = _before_mark(mark, program, reader)
        if equations:
            regions.append(Region((*equations, mark), mark.outputs))
    return regions


def _before_mark(mark: Equation, program: Program, reader: _Reader) -> list[Equation]:
    """What lies between the mark and the sites of which every way leads to it, in order."""

    def may_lie_inside(equation: Equation) -> bool:
        return equation is not mark and _may_lie_inside(equation, reader)

    return _before(mark.variables, program, reader, may_lie_inside)


def _before(
    ends: Sequence[Variable],
    program: Program,
    reader: _Reader,
    may_lie_inside: Callable[[Equation], bool],
) -> list[Equation]:
    """What lies between sites and the one reader of these variables, and leads nowhere else."""
    uses_inside: Counter[Variable] = Counter(ends)
    inside: list[Equation] = []
    for equation in reversed(program.equations):
        if not may_lie_inside(equation):
            continue
        exits = reader.noisy(equation)
        if not all(0 < uses_inside[v] == reader.uses[v] for v in exits):
            continue  # something outside reads it too
        inside.append(equation)
        # A site such as a dot starts the region: the error must not go on beyond it.
        if not reader.is_site(equation) or equation.facts.elementwise_for_regions:
            uses_inside.update(equation.variables)
    inside.reverse()
    return _behind_a_site(inside, reader)


def _may_lie_inside(equation: Equation, reader: _Reader) -> bool:
    """Whether an error may go from a noise point back through an equation, or to it."""
    if equation.loop is not None or equation.primitive is None or _is_mark(equation):
        return False
    if equation.irreversible:
        return False
    # Beyond a dot that is no site the error would be that of backprop.
    if equation.facts.bilinear and not reader.is_site(equation):
        return False
    return reader.is_mixed(equation)


def _behind_a_site(equations: list[Equation], reader: _Reader) -> list[Equation]:
    """The equations without those that no site of theirs leads to."""
    reached: set[Variable] = set()
    behind: list[Equation] = []
    for equation in equations:
        if reader.is_site(equation) or not reached.isdisjoint(equation.variables):
            behind.append(equation)
            for variable in equation.outputs:
                if is_inexact(reader.types[variable]):
                    reached.add(variable)
    return behind


def _is_mark(equation: Equation) -> bool:
    if not equation.facts.marks_noise_points:
        return False
    return equation.params.get("name") == NOISE_POINT
