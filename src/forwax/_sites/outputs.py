"""The parameter-free rest of the loss behind its last sites; reverse mode takes its exact error."""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
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
from forwax._sites.products import find_products
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
    stopped = site_barrier(level, kinds)
    blocked = blocked_variables(level.program, reach, stopped)
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
    stopped: Callable[[Equation], Collection[Variable]],
) -> set[Variable]:
    """The variables from which every way to the losses is stopped, or one of them.

    Args:
        program: the program.
        reach: the losses that each variable reaches.
        stopped: the inputs of an equation at which an error may not arrive through it.
    """
    blocked: set[Variable] = set()
    # All that reads an equation's outputs stands behind it: `blocked` is complete for them.
    for equation in reversed(program.equations):
        if not is_crossed(equation, reach):
            continue
        blocked.update(stopped(equation))
        if not blocked.isdisjoint(equation.outputs):
            blocked.update(equation.variables)
    return blocked


def site_barrier(
    level: Level, kinds: Kinds
) -> Callable[[Equation], Sequence[Variable]]:
    """Which inputs of an equation an exact error may not reach through it; often none.

    They are those of sites, and of what reverse mode cannot cross.
    """
    products = find_products(level.program, kinds)

    def stopped(equation: Equation) -> Sequence[Variable]:
        inputs = equation.variables
        if equation.loop is not None or equation.contains(
            lambda facts: facts.irreversible
        ):
            return inputs
        weights = products.weights(equation)
        if any(map(products.is_weight, weights)):
            data = (v for v in inputs if v not in products.copies)
            has_data = any(kinds[v] in (Kind.DATA, Kind.MIXED) for v in data)
            return inputs if has_data else ()
        # A weight that is a site itself may have its exact error: it crosses this product alone.
        return products.data_inputs(equation)

    return stopped


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
