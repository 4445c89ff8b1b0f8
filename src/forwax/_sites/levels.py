"""What is needed to assemble gradients: levels of parameter chains, regions and loops, and the values to record."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from forwax._programs.dataflow import Reach
from forwax._programs.program import Atom, Equation, Loop, Program, Variable, variables
from forwax._sites.kinds import Kind
from forwax._sites.regions import Region, find_regions

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

    def loop_of(self, equation: Equation) -> LoopPlan | None:
        """The plan of an equation that is a loop; None for others."""
        return self.loops.get(equation.outputs[0]) if equation.outputs else None

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


def parameters_read(level: Level, kinds: Kinds) -> set[Variable]:
    """The parameters, and what is made of them alone, that enter the regions of a level and the loops with regions."""
    read: list[Variable] = []
    for step in level.steps:
        if isinstance(step, Region):
            read += step.inputs
        elif isinstance(step, LoopPlan) and has_sites(step):
            read += variables([*step.fixed.values(), *step.scanned.values()])
    return {v for v in read if kinds[v] is Kind.PARAMETER}


def has_sites(plan: LoopPlan) -> bool:
    """Whether any step of a loop, or of a loop inside it, has a site."""
    return any(True for _ in plan.level.all_regions())


def chains(
    level: Level,
    kinds: Kinds,
    wanted: set[Variable],
    inputs: frozenset[Variable] = frozenset(),
) -> Level:
    """The part of a level that computes the wanted parameters; values of `inputs` come from outside."""
    wanted, needs = set(wanted), set()
    steps: list[Step] = []
    loops: dict[Variable, LoopPlan] = {}
    for step in reversed(level.steps):
        if isinstance(step, Region) or not wanted.intersection(_outputs(step)):
            continue
        if isinstance(step, LoopPlan):
            step = _loop_chains(step, kinds, wanted)
            loops[step.equation.outputs[0]] = step
            reads = variables([*step.fixed.values(), *step.scanned.values(), *step.kept.values()])
        else:
            reads = step.variables
        steps.append(step)
        wanted.update(v for v in reads if kinds[v] is Kind.PARAMETER)
        needs.update(v for v in reads if kinds[v] is not Kind.PARAMETER)
    return Level(level.program, tuple(reversed(steps)), frozenset(needs - inputs), loops)


def _outputs(step: Step) -> list[Variable]:
    if isinstance(step, LoopPlan):
        return [*step.kept, *step.stacked]
    assert not isinstance(step, Region)
    return list(step.outputs)


def _loop_chains(plan: LoopPlan, kinds: Kinds, wanted: set[Variable]) -> LoopPlan:
    stacked = {o: v for o, v in plan.stacked.items() if o in wanted}
    loop, body = plan.loop, plan.level.program
    given = frozenset(
        [
            *body.inputs[: loop.num_consts],
            *body.inputs[loop.num_consts + loop.num_carry :],
        ]
    )
    level = chains(plan.level, kinds, set(stacked.values()), given)
    read = {v for step in level.steps for v in _reads(step)} | set(stacked.values())
    return dataclasses.replace(
        plan,
        level=level,
        fixed={v: atom for v, atom in plan.fixed.items() if v in read},
        scanned={v: atom for v, atom in plan.scanned.items() if v in read},
        kept={o: atom for o, atom in plan.kept.items() if o in wanted},
        stacked=stacked,
    )
