"""The parameter-free rest of the loss behind its last sites, whose error reverse mode takes exactly."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import Array

from forwax._programs.dataflow import Reach, equation_reach
from forwax._programs.evaluate import bind, read
from forwax._programs.program import Atom, Constant, Equation, Program, Variable, variables
from forwax._sites.kinds import Kind
from forwax._sites.levels import Kinds, Level
from forwax._sites.regions import Region


@dataclasses.dataclass(frozen=True, eq=False)
class Tail:
    """From the output sites to the losses.

    Attributes:
        starts: where the error is wanted.
        equations: what lies between, in order.
        losses: the losses.
        records: the values that it takes from the forward pass, those of the starts that it does
            not compute included.
    """

    starts: tuple[Variable, ...]
    equations: tuple[Equation, ...]
    losses: tuple[Atom, ...]
    records: frozenset[Variable]

    def run(self, shifts: Mapping[Variable, Array], records: Mapping[Variable, Array]) -> list[Any]:
        """The losses that the starts reach, as a function of shifts added to the starts."""
        env: dict[Variable, Any] = {v: records[v] + shifts[v] for v in self.starts if v in records}
        known = collections.ChainMap(env, dict(records))
        for equation in self.equations:
            values = bind(equation, [read(atom, known) for atom in equation.inputs])
            for v, value in zip(equation.outputs, values, strict=True):
                env[v] = value + shifts[v] if v in shifts else value
        return [env[atom] for atom in self.losses if not isinstance(atom, Constant) and atom in env]


def make_tail(level: Level, kinds: Kinds, reach: Reach, num_losses: int) -> Tail:
    """The tail behind the output sites of a program's top level."""
    blocked = blocked_variables(level.program, reach, is_site_barrier(level, kinds))
    outputs = [region for region in level.regions if blocked.isdisjoint(region.outputs)]
    starts = tuple(v for region in outputs for v in region.outputs)
    return tail_from(level.program, starts, lambda equation: True, reach, num_losses)


def tail_from(
    program: Program, starts: tuple[Variable, ...], inside: Callable, reach: Reach, num_losses: int
) -> Tail:
    """The tail from the starts on, along the equations that are inside."""
    reached, equations = set(starts), []
    for equation in program.equations:
        if (
            is_crossed(equation, reach)
            and inside(equation)
            and reached.intersection(equation.variables)
        ):
            reached.update(equation.outputs)
            equations.append(equation)
    read = {v for equation in equations for v in equation.variables}
    computed = {v for equation in equations for v in equation.outputs}
    return Tail(
        starts,
        tuple(equations),
        program.outputs[:num_losses],
        frozenset((read | set(starts)) - computed),
    )


def is_crossed(equation: Equation, reach: Reach) -> bool:
    return equation_reach(equation, reach) != 0 and not equation.facts.stops_derivatives


def output_regions(level: Level, tail: Tail) -> list[Region]:
    """The regions whose error the tail gives."""
    return [region for region in level.regions if set(region.outputs) <= set(tail.starts)]


def blocked_variables(
    program: Program, reach: Reach, is_barrier: Callable[[Equation], bool]
) -> set[Variable]:
    """The variables from which a way to the losses crosses a barrier."""
    blocked: set[Variable] = set()
    for equation in reversed(program.equations):
        if is_crossed(equation, reach) and (
            is_barrier(equation) or blocked.intersection(equation.outputs)
        ):
            blocked.update(equation.variables)
    return blocked


def is_site_barrier(level: Level, kinds: Kinds) -> Callable[[Equation], bool]:
    """Barriers to an exact error: sites, and what reverse mode cannot cross."""
    noised = _noised(level.program, kinds)
    return lambda equation: _is_barrier(equation, kinds, noised)


def is_sum(equation: Equation, kinds: Kinds) -> bool:
    """Whether an operation only adds entries up, or scales them by what no parameter enters."""
    entering = [kinds[v] for v in equation.variables]
    if Kind.PARAMETER in entering or equation.primitive is None:
        return False
    mixed = [atom in equation.variables and kinds[atom] is Kind.MIXED for atom in equation.inputs]  # type: ignore[index]
    scaled = sum(mixed) == 1 and mixed.index(True) in equation.facts.scaled
    return equation.facts.sum_behind_outputs or scaled


def _is_barrier(equation: Equation, kinds: Kinds, noised: set[Variable]) -> bool:
    """Whether an error that crosses here would need a parameter; a sum passes it on as it is."""
    inputs = equation.variables
    weights = [v for v in inputs if kinds[v] is Kind.PARAMETER or v in noised]
    if equation.loop is not None or equation.contains(lambda facts: facts.irreversible):
        return True
    if equation.primitive is None or equation.facts.additive or not weights:
        return False
    return _meets_data(equation.inputs, kinds, noised)


def _meets_data(inputs: Sequence[Atom], kinds: Kinds, noised: set[Variable]) -> bool:
    return any(
        kinds[v] in (Kind.DATA, Kind.MIXED) and v not in noised for v in variables(inputs)
    ) or any(isinstance(atom, Constant) and getattr(atom.value, "ndim", 0) for atom in inputs)


def _noised(program: Program, kinds: Kinds) -> set[Variable]:
    """What is made of parameters with weight noise and no data."""
    noised: set[Variable] = set()
    for equation in program.equations:
        inputs = equation.variables
        alone = all(v in noised or kinds[v] in (Kind.PARAMETER, Kind.CONSTANT) for v in inputs)
        if equation.primitive is None or (noised.intersection(inputs) and alone):
            noised.update(equation.outputs)
    return noised
