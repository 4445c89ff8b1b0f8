"""The parameter-free rest of the loss behind its last sites, whose error reverse mode takes exactly."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from forwax.sites.classify import Kind
from forwax.sites.plan import Kinds, Level
from forwax.sites.program import Atom, Constant, Equation, Program, Variable, bind, variables
from forwax.sites.reach import Reach, equation_reach
from forwax.sites.regions import Region

_ADDITIVE = {"add", "sub", "add_any"}


@dataclasses.dataclass(frozen=True, eq=False)
class Tail:
    """From the output sites to the losses.

    Attributes:
        starts: where the error is wanted.
        equations: what lies between, in order.
        losses: the losses.
        records: the values that it takes from the forward pass, those of the starts that it does not compute included.
    """

    starts: tuple[Variable, ...]
    equations: tuple[Equation, ...]
    losses: tuple[Atom, ...]
    records: frozenset[Variable]

    def run(self, shifts: Mapping[Variable, Array], records: Mapping[Variable, Array]) -> list[Any]:
        """The losses that the starts reach, as a function of shifts added to the starts."""
        env: dict[Variable, Any] = {}

        def read(atom: Atom) -> Any:
            return atom.value if isinstance(atom, Constant) else env[atom] if atom in env else records[atom]

        env |= {v: records[v] + shifts[v] for v in self.starts if v in records}
        for equation in self.equations:
            for v, value in zip(equation.outputs, bind(equation, [read(a) for a in equation.inputs]), strict=True):
                env[v] = value + shifts[v] if v in shifts else value
        return [env[atom] for atom in self.losses if not isinstance(atom, Constant) and atom in env]


def make_tail(level: Level, kinds: Kinds, reach: Reach, num_losses: int) -> Tail:
    """The tail behind the output sites of a program's top level."""
    program = level.program
    blocked = _blocked(program, kinds, reach)
    outputs = [region for region in level.regions if blocked.isdisjoint(region.outputs)]
    starts = tuple(v for region in outputs for v in region.outputs)
    inside, equations = set(starts), []
    for equation in program.equations:
        crossed = equation_reach(equation, reach) and equation.name != "stop_gradient"
        if crossed and inside.intersection(equation.variables):
            inside.update(equation.outputs)
            equations.append(equation)
    read = {v for equation in equations for v in equation.variables}
    computed = {v for equation in equations for v in equation.outputs}
    return Tail(starts, tuple(equations), program.outputs[:num_losses], frozenset((read | set(starts)) - computed))


def output_regions(level: Level, tail: Tail) -> list[Region]:
    """The regions whose error the tail gives."""
    return [region for region in level.regions if set(region.outputs) <= set(tail.starts)]


def _blocked(program: Program, kinds: Kinds, reach: Reach) -> set[Variable]:
    """The variables from which a way to the losses crosses a site, or what reverse mode cannot cross."""
    noised = _noised(program, kinds)
    blocked: set[Variable] = set()
    for equation in reversed(program.equations):
        if not equation_reach(equation, reach) or equation.name == "stop_gradient":
            continue
        if _is_barrier(equation, kinds, noised) or blocked.intersection(equation.outputs):
            blocked.update(equation.variables)
    return blocked


def _is_barrier(equation: Equation, kinds: Kinds, noised: set[Variable]) -> bool:
    """Whether an error that crosses here would need a parameter; a sum passes it on as it is."""
    inputs = equation.variables
    weights = [v for v in inputs if kinds[v] is Kind.PARAMETER or v in noised]
    if equation.loop is not None or equation.contains("while"):
        return True
    if equation.primitive is None or equation.name in _ADDITIVE or not weights:
        return False
    return _meets_data(equation.inputs, kinds, noised)


def _meets_data(inputs: Sequence[Atom], kinds: Kinds, noised: set[Variable]) -> bool:
    return any(kinds[v] in (Kind.DATA, Kind.MIXED) and v not in noised for v in variables(inputs)) or any(
        isinstance(atom, Constant) and getattr(atom.value, "ndim", 0) for atom in inputs
    )


def _noised(program: Program, kinds: Kinds) -> set[Variable]:
    """What is made of parameters with weight noise and no data."""
    noised: set[Variable] = set()
    for equation in program.equations:
        inputs = equation.variables
        alone = all(v in noised or kinds[v] in (Kind.PARAMETER, Kind.CONSTANT) for v in inputs)
        if equation.primitive is None or (noised.intersection(inputs) and alone):
            noised.update(equation.outputs)
    return noised
