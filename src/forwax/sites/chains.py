"""What is made of parameters alone on the way to the sites: a plan with the sites left out."""

import dataclasses

from forwax.sites.classify import Kind
from forwax.sites.plan import Kinds, Level, LoopPlan, Step
from forwax.sites.program import Variable, variables
from forwax.sites.regions import Region


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
    level: Level, kinds: Kinds, wanted: set[Variable], inputs: frozenset[Variable] = frozenset()
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
        [*body.inputs[: loop.num_consts], *body.inputs[loop.num_consts + loop.num_carry :]]
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


def _reads(step: Step) -> list[Variable]:
    if isinstance(step, LoopPlan):
        return variables([*step.fixed.values(), *step.scanned.values(), *step.kept.values()])
    assert not isinstance(step, Region)
    return step.variables
