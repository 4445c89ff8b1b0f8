"""What gradients are assembled from: levels of parameter chains, regions and loops, and records."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from forwax._programs.dataflow import Reach
from forwax._programs.program import Atom, Equation, Loop, Program, Variable, variables
from forwax._sites.kinds import Kind
from forwax._sites.products import Kinds, Products
from forwax._sites.regions import Region, find_regions


@dataclasses.dataclass(frozen=True, eq=False)
class LoopPlan:
    """How a loop's regions are assembled, over recorded time.

    Attributes:
        equation: the scan.
        level: its body.
        fixed: values of the body that are the same in every step, with where they come from.
        scanned: values of the body that are slices of outer arrays, with these arrays.
        unchanged: parameters that the loop returns as they are: outer output and where it comes
            from.
        stacked: parameters that the body returns for each step: outer output and body variable.
    """

    equation: Equation
    level: "Level"
    fixed: dict[Variable, Atom]
    scanned: dict[Variable, Atom]
    unchanged: dict[Variable, Atom]
    stacked: dict[Variable, Variable]

    @property
    def loop(self) -> Loop:
        """The equation's loop."""
        assert self.equation.loop is not None
        return self.equation.loop

    @property
    def variables(self) -> list[Variable]:
        """The outer variables that the assembly reads."""
        return variables(
            [
                *self.fixed.values(),
                *self.scanned.values(),
                *self.unchanged.values(),
            ]
        )


Step: TypeAlias = Equation | Region | LoopPlan


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """One program, or the body of one loop.

    Attributes:
        program: everything, for the forward pass.
        steps: what the assembly evaluates: parameter chains, regions and loops, in order.
        records: the variables, not made of parameters alone, whose values the assembly needs.
        loops: plans by their equation, which is compared by identity.
    """

    program: Program
    steps: tuple[Step, ...]
    records: frozenset[Variable]
    loops: dict[Equation, LoopPlan]

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

    def loop_of(self, equation: Equation) -> LoopPlan | None:
        """The plan of an equation that is a loop in which parameters meet data."""
        return self.loops.get(equation)

    def all_records(self) -> set[Variable]:
        """The variables recorded here and in the loops inside."""
        records = set(self.records)
        for plan in self.loops.values():
            records |= plan.level.all_records()
        return records


class _Assembly:
    """The steps of a level while they are gathered backwards, each for what later ones read.

    Attributes:
        kinds: of all variables.
        wanted: parameters, and what is made of them alone, that a step must give.
        others: what else the steps read, which is recorded.
        steps: from the last one to the first.
    """

    def __init__(self, kinds: Kinds, wanted: Iterable[Variable]) -> None:
        self.kinds = kinds
        self.wanted = set(wanted)
        self.others: set[Variable] = set()
        self.steps: list[Step] = []

    def wants(self, outputs: Iterable[Variable]) -> bool:
        return not self.wanted.isdisjoint(outputs)

    def add(self, step: Step) -> None:
        self.steps.append(step)
        for variable in _reads(step):
            if self.kinds[variable] is Kind.PARAMETER:
                self.wanted.add(variable)
            else:
                self.others.add(variable)

    def level(
        self,
        program: Program,
        loops: dict[Equation, LoopPlan],
        inputs: frozenset[Variable],
    ) -> Level:
        steps = tuple(reversed(self.steps))
        return Level(program, steps, frozenset(self.others - inputs), loops)


def make_level(
    program: Program,
    products: Products,
    reach: Reach,
    types: Sequence[Any],
    inputs: frozenset[Variable] = frozenset(),
) -> Level:
    """Plan one level; values of `inputs` come from outside, so that they need no record here."""
    kinds = products.kinds
    regions = find_regions(program, products, reach, types)
    region_at = {region.equations[-1]: region for region in regions}
    loops: dict[Equation, LoopPlan] = {}
    for equation in program.equations:
        if equation.loop is not None:
            loops[equation] = _plan_loop(
                equation, equation.loop, products, reach, types
            )

    # Backwards, so that whatever reads an equation's outputs has been added before it.
    outputs = variables(program.outputs)
    assembly = _Assembly(kinds, _parameters(outputs, kinds))
    for equation in reversed(program.equations):
        if equation in region_at:
            assembly.add(region_at[equation])
        elif equation in loops:
            plan = loops[equation]
            # Regions inside count by themselves, chains only for the parameters that come out.
            if plan.level.steps or assembly.wants(equation.outputs):
                assembly.add(plan)
        elif assembly.wants(
            equation.outputs
        ):  # only parameters are ever wanted: it is a chain
            assembly.add(equation)
    return assembly.level(program, loops, inputs)


def _plan_loop(
    equation: Equation,
    loop: Loop,
    products: Products,
    reach: Reach,
    types: Sequence[Any],
) -> LoopPlan:
    kinds = products.kinds
    body = loop.body
    consts, carry, xs = loop.split(body.inputs)
    level = make_level(
        body,
        products,
        reach,
        types,
        inputs=frozenset([*consts, *xs]),
    )
    # Variables are unique over nested bodies, so that one table may hold those of all.
    read = {v for step in level.steps for v in _reads(step)}
    read.update(variables(body.outputs))

    # A carry that is still a parameter comes back as it went in: it is the same in every step.
    constant = [*consts, *_parameters(carry, kinds)]
    carried_outputs, stacked_outputs = loop.split_outputs(equation.outputs)
    outer = dict(zip(body.inputs, equation.inputs, strict=True))
    inner: dict[Variable, Any] = dict(zip(equation.outputs, body.outputs, strict=True))
    return LoopPlan(
        equation,
        level,
        fixed={v: outer[v] for v in constant if v in read},
        scanned={v: outer[v] for v in xs if v in read},
        unchanged={v: outer[inner[v]] for v in _parameters(carried_outputs, kinds)},
        stacked={v: inner[v] for v in _parameters(stacked_outputs, kinds)},
    )


def _parameters(variables: Iterable[Variable], kinds: Kinds) -> list[Variable]:
    return [v for v in variables if kinds[v] is Kind.PARAMETER]


def _reads(step: Step) -> list[Variable]:
    if isinstance(step, Region):
        return step.inputs
    return step.variables


def parameters_read(level: Level, kinds: Kinds) -> set[Variable]:
    """What is made of parameters alone and enters regions, or loops with regions, of a level."""
    read: list[Variable] = []
    for step in level.steps:
        if isinstance(step, Region):
            read += step.inputs
        elif isinstance(step, LoopPlan) and has_sites(step):
            read += variables(step.fixed.values())
            read += variables(step.scanned.values())
    return set(_parameters(read, kinds))


def has_sites(plan: LoopPlan) -> bool:
    """Whether any step of a loop, or of a loop inside it, has a site."""
    return any(True for _ in plan.level.all_regions())


def chains(
    level: Level,
    kinds: Kinds,
    wanted: Iterable[Variable],
    inputs: frozenset[Variable] = frozenset(),
) -> Level:
    """The part of a level that computes the wanted parameters.

    Values of `inputs` come from outside.
    """
    assembly = _Assembly(kinds, wanted)
    loops: dict[Equation, LoopPlan] = {}
    for step in reversed(level.steps):
        if isinstance(step, Region):
            continue
        if isinstance(step, LoopPlan):
            if assembly.wants([*step.unchanged, *step.stacked]):
                plan = _loop_chains(step, kinds, assembly.wanted)
                loops[plan.equation] = plan
                assembly.add(plan)
        elif assembly.wants(step.outputs):
            assembly.add(step)
    return assembly.level(level.program, loops, inputs)


def _loop_chains(plan: LoopPlan, kinds: Kinds, wanted: set[Variable]) -> LoopPlan:
    stacked = {v: inner for v, inner in plan.stacked.items() if v in wanted}
    consts, _, xs = plan.loop.split(plan.level.program.inputs)
    level = chains(
        plan.level,
        kinds,
        stacked.values(),
        frozenset([*consts, *xs]),
    )
    read = {v for step in level.steps for v in _reads(step)}
    read.update(stacked.values())
    return dataclasses.replace(
        plan,
        level=level,
        fixed={v: atom for v, atom in plan.fixed.items() if v in read},
        scanned={v: atom for v, atom in plan.scanned.items() if v in read},
        unchanged={v: atom for v, atom in plan.unchanged.items() if v in wanted},
        stacked=stacked,
    )
