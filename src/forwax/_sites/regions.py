"""Sites and the regions around them: from a parameter's meeting with data to the place where noise enters.

A region has one exit, so that noise there reaches all that its parameters reach. A site alone is a
region; a bias or a gain that follows, or a second site added to it, joins it as long as nothing
else reads what lies between; a noise point makes everything between a site and the mark one region.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from forwax._programs.dataflow import Reach, equation_reach
from forwax._programs.primitives import ADDITIVE, BILINEAR, MOVES
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Program,
    Variable,
    is_inexact,
    variables,
)
from forwax._sites.kinds import Kind
from forwax._sites.noise_point import NOISE_POINT

_SCALING = {"mul", "div"}


_PASSED = ADDITIVE | MOVES | {"expand_dims", "neg", "copy"}


_ELEMENTWISE = ADDITIVE | _SCALING | {"pow", "max", "min", "select_n"}


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
        inner = {v for equation in self.equations for v in equation.outputs}
        return list(dict.fromkeys(v for e in self.equations for v in e.variables if v not in inner))

    @property
    def promoted(self) -> bool:
        """Whether this is a parameter with a noise of its own: weight noise."""
        return all(equation.primitive is None for equation in self.equations)


@dataclasses.dataclass
class _Growing:
    """A region that may still grow: equations that belong to it, and moves that count once something joins."""

    equations: list[Equation]
    tail: list[Equation]


class _Reader:
    """What the search asks about a program's variables."""

    def __init__(
        self,
        program: Program,
        kinds: dict[Variable, Kind],
        reach: Reach,
        types: Sequence[Any],
    ) -> None:
        self.kinds, self.reach, self.types = kinds, reach, types
        used = [
            v
            for e in program.equations
            if self.live(e) and e.name != "stop_gradient"
            for v in e.variables
        ]
        self.uses = Counter([*used, *(v for v in variables(program.outputs) if reach[v])])

    def live(self, equation: Equation) -> bool:
        return equation_reach(equation, self.reach) != 0

    def takes_parameter(self, equation: Equation) -> bool:
        return any(self.kinds[v] is Kind.PARAMETER for v in equation.variables)

    def is_site(self, equation: Equation) -> bool:
        """Whether a parameter meets data here."""
        mixed = any(self.kinds[v] is Kind.MIXED for v in equation.outputs)
        return equation.loop is None and mixed and self.takes_parameter(equation)

    def is_mixed(self, equation: Equation) -> bool:
        return any(self.kinds[v] is Kind.MIXED for v in equation.outputs)

    def noisy(self, equation: Equation) -> tuple[Variable, ...]:
        return tuple(v for v in equation.outputs if self.kinds[v] is Kind.MIXED)

    def same_size(self, left: Atom, right: Atom) -> bool:
        if isinstance(left, Constant) or isinstance(right, Constant):
            return False
        return math.prod(self.types[left].shape) == math.prod(self.types[right].shape)


def find_regions(
    program: Program, kinds: dict[Variable, Kind], reach: Reach, types: Sequence[Any]
) -> list[Region]:
    """The regions at one level of a program; bodies of loops are levels of their own."""
    reader = _Reader(program, kinds, reach, types)
    marked = _marked_regions(program, reader)
    taken = {id(e) for region in marked for e in region.equations}
    growing: list[_Growing] = []
    fresh: dict[Variable, _Growing] = {}
    for equation in program.equations:
        if id(equation) in taken or equation.loop is not None or not reader.is_mixed(equation):
            continue
        _grow(equation, reader, growing, fresh)
    order = {id(equation): i for i, equation in enumerate(program.equations)}
    grown = [_finished(item, reader, order) for item in growing]
    return sorted([*marked, *grown], key=lambda region: order[id(region.equations[-1])])


def _finished(item: _Growing, reader: _Reader, order: dict[int, int]) -> Region:
    equations = sorted(item.equations, key=lambda e: order[id(e)])
    return Region(tuple(equations), reader.noisy(equations[-1]))


def _grow(
    equation: Equation,
    reader: _Reader,
    growing: list[_Growing],
    fresh: dict[Variable, _Growing],
) -> None:
    """Let an equation join the regions that end in its inputs, or start a region, or end them."""
    carried = [v for v in equation.variables if v in fresh and reader.uses[v] == 1]
    joining = [fresh[v] for v in carried] if _may_join(equation, reader, carried) else []
    site = reader.is_site(equation)
    if joining and (site or len(joining) > 1):
        for item in joining:
            growing.remove(item)
        item = _Growing(
            [e for part in joining for e in part.equations + part.tail] + [equation], []
        )
        growing.append(item)
    elif joining:
        item = joining[0]
        item.tail.append(equation)
    elif site:
        item = _Growing([equation], [])
        growing.append(item)
    else:
        return
    if len(equation.outputs) == 1 and equation.primitive is not None:
        fresh[equation.outputs[0]] = item


def _may_join(equation: Equation, reader: _Reader, carried: list[Variable]) -> bool:
    """Whether noise may move from behind these inputs to behind the equation, which must not make it larger."""
    if not carried or len(equation.outputs) != 1:
        return False
    if not all(reader.same_size(v, equation.outputs[0]) for v in carried):
        return False
    if equation.name in _SCALING:  # a gain: the other factor is a parameter
        first = equation.name == "mul" or equation.inputs[0] in carried
        return len(carried) == 1 and first and reader.takes_parameter(equation)
    return equation.name in _PASSED


def _marked_regions(program: Program, reader: _Reader) -> list[Region]:
    regions = []
    for mark in program.equations:
        if mark.name == "name" and mark.params.get("name") == NOISE_POINT and reader.is_mixed(mark):
            equations = _before_mark(mark, program, reader)
            if equations:
                regions.append(Region((*equations, mark), mark.outputs))
    return regions


def _before_mark(mark: Equation, program: Program, reader: _Reader) -> list[Equation]:
    """What lies between the mark and the sites of which every way leads to it, in the program's order."""
    inside: Counter[Variable] = Counter(mark.variables)  # uses by the region so far
    chosen: list[Equation] = []
    for equation in reversed(program.equations):
        if equation is mark or not reader.is_mixed(equation) or equation.loop is not None:
            continue
        outputs = reader.noisy(equation)
        if not all(0 < inside[v] == reader.uses[v] for v in outputs):
            continue
        site = reader.is_site(equation)
        if equation.primitive is None or _is_mark(equation) or equation.contains("while"):
            continue
        if not site and equation.name in BILINEAR:
            continue
        chosen.append(equation)
        if (
            not site or equation.name in _ELEMENTWISE
        ):  # beyond an operation such as a dot the error must not go
            inside.update(equation.variables)
    return _behind_a_site(list(reversed(chosen)), reader)


def _behind_a_site(equations: list[Equation], reader: _Reader) -> list[Equation]:
    kept: list[Equation] = []
    reached: set[Variable] = set()
    for equation in equations:
        if reader.is_site(equation) or reached & set(equation.variables):
            kept.append(equation)
            reached.update(v for v in equation.outputs if is_inexact(reader.types[v]))
    return kept


def _is_mark(equation: Equation) -> bool:
    return equation.name == "name" and equation.params.get("name") == NOISE_POINT
