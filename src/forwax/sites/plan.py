"""What is needed to assemble gradients: levels of parameter chains, regions and loops, and the values to record."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from forwax.sites.classify import Kind
from forwax.sites.program import Atom, Constant, Equation, Loop, Program, Variable, variables
from forwax.sites.reach import Reach
from forwax.sites.regions import Region, find_regions

Kinds: TypeAlias = dict[Variable, Kind]


@dataclasses.dataclass(frozen=True, eq=False)
class LoopPlan:
    """How a loop's regions are assembled, over recorded time.

    Attributes:
        equation: the scan.
        level: its body.
        fixed: values of the body that are the same in every step, with where they come from.
        scanned: values of the body that are slices of outer arrays, with these arrays.
        kept: parameters that the loop returns unchanged: outer output and where it comes from.
        stacked: parameters that the body returns for each step: outer output and body variable.
    """

    equation: Equation
    level: "Level"
    fixed: dict[Variable, Atom]
    scanned: dict[Variable, Atom]
    kept: dict[Variable, Atom]
    stacked: dict[Variable, Variable]

    @property
    def loop(self) -> Loop:
        """The equation's loop."""
        assert self.equation.loop is not None
        return self.equation.loop


Step: TypeAlias = Equation | Region | LoopPlan


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One program, or the body of one loop.

    Attributes:
        program: everything, for the forward pass.
        steps: what the assembly evaluates: parameter chains, regions and loops, in order.
        records: the variables, not made of parameters alone, whose values the assembly needs.
        loops: plans by the identity of their scan's first output.
    """

    program: Program
    steps: tuple[Step, ...]
    records: frozenset[Variable]
    loops: dict[Variable, LoopPlan]

    @property
    def regions(self) -> list[Region]:
        """The regions of this level alone."""
        return [step for step in self.steps if isinstance(step, Region)]

    def all_regions(
        self, lengths: tuple[int, ...] = ()
    ) -> Iterable[tuple[Region, tuple[int, ...]]]:
        """Every region with the lengths of the loops around it, outermost first."""
        for step in self.steps:
            if isinstance(step, Region):
                yield step, lengths
            elif isinstance(step, LoopPlan):
                yield from step.level.all_regions((*lengths, step.loop.length))

    def all_records(self) -> set[Variable]:
        """The variables recorded here and in the loops inside."""
        inner = [plan.level.all_records() for plan in self.loops.values()]
        return set(self.records).union(*inner)


def make_level(
    program: Program,
    kinds: Kinds,
    reach: Reach,
    types: Sequence[Any],
    inputs: frozenset = frozenset(),
):
    """Plan one level; values of `inputs` come from outside, so that they need no record here."""
    regions = find_regions(program, kinds, reach, types)
    last = {id(region.equations[-1]): region for region in regions}
    loops = {
        e.outputs[0]: _plan_loop(e, kinds, reach, types)
        for e in program.equations
        if e.loop is not None
    }
    wanted = {v for v in variables(program.outputs) if kinds[v] is Kind.PARAMETER}
    needs: set[Variable] = set()
    steps: list[Step] = []
    for equation in reversed(program.equations):
        plan = loops.get(equation.outputs[0]) if equation.outputs else None
        if id(equation) in last:
            step: Step = last[id(equation)]
            reads = step.inputs
        elif plan is not None and (plan.level.steps or wanted.intersection(equation.outputs)):
            step, reads = (
                plan,
                variables([*plan.fixed.values(), *plan.scanned.values(), *plan.kept.values()]),
            )
        elif wanted.intersection(v for v in equation.outputs if kinds[v] is Kind.PARAMETER):
            step, reads = equation, equation.variables
        else:
            continue
        steps.append(step)
        wanted.update(v for v in reads if kinds[v] is Kind.PARAMETER)
        needs.update(v for v in reads if kinds[v] is not Kind.PARAMETER)
    return Level(program, tuple(reversed(steps)), frozenset(needs - inputs), loops)


def _plan_loop(equation: Equation, kinds: Kinds, reach: Reach, types: Sequence[Any]) -> LoopPlan:
    loop = equation.loop
    assert loop is not None
    body, first, last = loop.body, loop.num_consts, loop.num_consts + loop.num_carry
    outer = dict(zip(body.inputs, equation.inputs, strict=True))
    given = frozenset([*body.inputs[:first], *body.inputs[last:]])
    level = make_level(body, kinds, reach, types, given)
    read = {v for step in level.steps for v in _reads(step)} | set(variables(body.outputs))
    constant = [
        *body.inputs[:first],
        *(v for v in body.inputs[first:last] if kinds[v] is Kind.PARAMETER),
    ]
    pairs = list(zip(equation.outputs, body.outputs, strict=True))
    return LoopPlan(
        equation,
        level,
        {v: outer[v] for v in constant if v in read},
        {v: outer[v] for v in body.inputs[last:] if v in read},
        {o: outer[b] for o, b in pairs[: loop.num_carry] if _is_parameter(o, kinds)},  # type: ignore[index]
        {o: b for o, b in pairs[loop.num_carry :] if _is_parameter(o, kinds)},  # type: ignore[misc]
    )


def _is_parameter(variable: Variable, kinds: Kinds) -> bool:
    return kinds[variable] is Kind.PARAMETER


def _reads(step: Step) -> list[Variable]:
    if isinstance(step, Region):
        return step.inputs
    if isinstance(step, LoopPlan):
        return variables([*step.fixed.values(), *step.scanned.values(), *step.kept.values()])
    return step.variables


def mapped_variables(program: Program, inputs: Iterable[Variable]) -> set[Variable]:
    """The variables that depend on the given inputs: those that differ between examples."""
    mapped = set(inputs)
    _spread(program, mapped)
    return mapped


def _spread(program: Program, mapped: set[Variable]) -> None:
    for equation in program.equations:
        if equation.loop is not None:
            _spread_loop(equation, equation.loop, mapped)
        elif mapped.intersection(equation.variables):
            mapped.update(equation.outputs)


def _spread_loop(equation: Equation, loop: Loop, mapped: set[Variable]) -> None:
    def depends(atom: Atom) -> bool:
        return not isinstance(atom, Constant) and atom in mapped

    body, first = loop.body, loop.num_consts
    mapped.update(v for v, atom in zip(body.inputs, equation.inputs, strict=True) if depends(atom))
    while True:  # the set only grows
        size = len(mapped)
        _spread(body, mapped)
        carries = body.inputs[first : first + loop.num_carry]
        mapped.update(v for v, out in zip(carries, body.outputs, strict=False) if depends(out))
        if len(mapped) == size:
            break
    mapped.update(v for v, out in zip(equation.outputs, body.outputs, strict=True) if depends(out))
