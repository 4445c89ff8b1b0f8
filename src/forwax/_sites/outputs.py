"""The parameter-free rest of the loss behind its last sites; reverse mode takes its exact error."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax import Array

from forwax._programs.dataflow import Reach, equation_reach
from forwax._programs.evaluate import Values, bind, read
from forwax._programs.program import (
    Atom,
    Constant,
    Equation,
    Program,
    Variable,
    variables,
)
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

    def run(
        self,
        shifts: Mapping[Variable, Array],
        records: Mapping[Variable, Array],
    ) -> list[Any]:
        """The losses that the starts reach, as a function of shifts added to the starts."""
        # Starts that the forward pass recorded; the tail computes the others itself.
        env: Values = {}
        for start in self.starts:
            if start in records:
                env[start] = records[start] + shifts[start]
        known = collections.ChainMap(env, dict(records))
        for equation in self.equations:
            inputs = [read(atom, known) for atom in equation.inputs]
            outputs = bind(equation, inputs)
            for variable, value in zip(equation.outputs, outputs, strict=True):
                if variable in shifts:
                    value = value + shifts[variable]
                env[variable] = value
        return [env[v] for v in variables(self.losses) if v in env]


NO_TAIL = Tail((), (), (), frozenset())
"""Behind no site, when errors are not taken exactly."""


def make_tail(level: Level, kinds: Kinds, reach: Reach, num_losses: int) -> Tail:
    """The tail behind the output sites of a program's top level."""
    is_barrier = site_barrier(level, kinds)
    blocked = blocked_variables(level.program, reach, is_barrier)
    # An output site reaches no other: so its error is exact without crossing one.
    starts: list[Variable] = []
    for region in level.regions:
        if blocked.isdisjoint(region.outputs):
            starts += region.outputs
    return tail_from(
        level.program,
        tuple(starts),
        lambda equation: True,
        reach,
        num_losses,
    )


def tail_from(
    program: Program,
    starts: tuple[Variable, ...],
    is_inside: Callable[[Equation], bool],
    reach: Reach,
    num_losses: int,
) -> Tail:
    """The tail from the starts on, along the equations that are inside."""
    reached = set(starts)
    reads: set[Variable] = set()
    computed: set[Variable] = set()
    equations: list[Equation] = []
    for equation in program.equations:
        if not is_crossed(equation, reach) or not is_inside(equation):
            continue
        if reached.isdisjoint(equation.variables):
            continue
        equations.append(equation)
        reached.update(equation.outputs)
        reads.update(equation.variables)
        computed.update(equation.outputs)
    needed = reads | set(starts)
    return Tail(
        starts,
        tuple(equations),
        losses=program.outputs[:num_losses],
        records=frozenset(needed - computed),
    )


def is_crossed(equation: Equation, reach: Reach) -> bool:
    """Whether derivatives of the losses go through an equation."""
    reaches_losses = equation_reach(equation, reach) != 0
    return reaches_losses and not equation.facts.stops_derivatives


def output_regions(level: Level, tail: Tail) -> list[Region]:
    """The regions whose error the tail gives."""
    starts = set(tail.starts)
    return [region for region in level.regions if starts.issuperset(region.outputs)]


def blocked_variables(
    program: Program,
    reach: Reach,
    is_barrier: Callable[[Equation], bool],
) -> set[Variable]:
    """The variables from which a way to the losses crosses a barrier."""
    blocked: set[Variable] = set()
    # All that reads an equation's outputs stands behind it: `blocked` is complete for them.
    for equation in reversed(program.equations):
        if not is_crossed(equation, reach):
            continue
        if is_barrier(equation) or not blocked.isdisjoint(equation.outputs):
            blocked.update(equation.variables)
    return blocked


def site_barrier(level: Level, kinds: Kinds) -> Callable[[Equation], bool]:
    """Which equations an exact error may not cross: sites, and what reverse mode cannot."""
    with_noise = with_weight_noise(level.program, kinds)

    def is_barrier(equation: Equation) -> bool:
        if equation.loop is not None or equation.contains(
            lambda facts: facts.irreversible
        ):
            return True
        # A sum passes errors on as they are, whatever it adds.
        if equation.primitive is None or equation.facts.additive:
            return False
        inputs = equation.variables
        has_weights = any(v in with_noise or kinds[v] is Kind.PARAMETER for v in inputs)
        return has_weights and has_data(equation.inputs)

    def has_data(inputs: Iterable[Atom]) -> bool:
        for atom in inputs:
            if isinstance(
                atom, Constant
            ):  # an array in the program is data, a scalar is not
                if getattr(atom.value, "ndim", 0):
                    return True
            elif kinds[atom] in (Kind.DATA, Kind.MIXED) and atom not in with_noise:
                return True
        return False

    return is_barrier


def is_sum(equation: Equation, kinds: Kinds) -> bool:
    """Whether an operation only adds entries up, or scales them by what no parameter enters."""
    if equation.primitive is None:
        return False
    if any(kinds[v] is Kind.PARAMETER for v in equation.variables):
        return False
    if equation.facts.sum_behind_outputs:
        return True
    mixed: list[int] = []
    for position, atom in enumerate(equation.inputs):
        if not isinstance(atom, Constant) and kinds[atom] is Kind.MIXED:
            mixed.append(position)
    return len(mixed) == 1 and mixed[0] in equation.facts.scaled


def with_weight_noise(
    program: Program, kinds: Mapping[Variable, Kind], given: Iterable[Variable] = ()
) -> set[Variable]:
    """What is made of parameters with weight noise and no data.

    Of those, `given` come from outside.
    """
    with_noise = set(given)
    for equation in program.equations:
        inputs = equation.variables
        if equation.primitive is None:  # a promotion
            with_noise.update(equation.outputs)
            continue
        others = [v for v in inputs if v not in with_noise]
        has_no_data = all(kinds[v] in (Kind.PARAMETER, Kind.CONSTANT) for v in others)
        if has_no_data and len(others) < len(inputs):
            with_noise.update(equation.outputs)
    return with_noise
