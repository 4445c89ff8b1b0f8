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
from forwax._sites.levels import Level
from forwax._sites.products import Kinds, Products
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


def make_tail(level: Level, products: Products, reach: Reach, num_losses: int) -> Tail:
    """The tail behind the output sites of a program's top level."""
    stopped = site_barrier(products)
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


def check_tail(tail: Tail, products: Products) -> None:
    """Assert that no error of a tail comes through two products with trained weights.

    A start that is no weight has one behind it, its own: from there on there may be none.

    Raises:
        AssertionError: when a way to a loss holds one more; the tail would be backprop's.
    """
    # for each variable the products on its way back from the losses' side to a parameter
    crossed = {v: 0 if v in products.mixed else 1 for v in tail.starts}
    for equation in tail.equations:
        on_the_way = [crossed[v] for v in equation.variables if v in crossed]
        if not on_the_way:
            continue
        is_weight = products.makes_weights(equation)
        most = max(on_the_way) + (products.is_product(equation) and not is_weight)
        if most > 1:
            raise AssertionError(
                f"forwax: the error of a last site crosses {equation.name} "
                f"({equation.source or 'no place known'}), a product with a trained weight, beside "
                "its own: that would be backprop. This is a bug of forwax; please report the loss. "
                "exact_outputs=False does without such errors."
            )
        for v in equation.outputs:
            crossed[v] = max(most, crossed.get(v, 0))


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


def site_barrier(products: Products) -> Callable[[Equation], Sequence[Variable]]:
    """Which inputs of an equation an exact error may not reach through it; often none.

    They are those of sites, and of what reverse mode cannot cross.
    """

    def stopped(equation: Equation) -> Sequence[Variable]:
        inputs = equation.variables
        if equation.loop is not None or equation.irreversible:
            return inputs
        weights = products.weights(equation)
        if any(map(products.is_weight, weights)):
            return inputs if products.is_product(equation) else ()
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
