"""A forward pass whose reverse pass goes through other matrices than the parameters (Lillicrap et al. 2016)."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from forwax.sites.classify import Kind
from forwax.sites.operations import BILINEAR
from forwax.sites.plan import Kinds, Level, LoopPlan
from forwax.sites.program import Atom, Constant, Equation, Variable, bind, read, variables

Values = dict[Variable, Any]


def forward_with_feedback(
    level: Level, kinds: Kinds, inputs: Sequence[Any], feedback: Values
) -> list[Any]:
    """Evaluate a level so that errors cross its dots and convolutions through the feedback.

    Args:
        level: what to evaluate.
        kinds: the kind of each variable.
        inputs: the values of the program's inputs.
        feedback: for the inputs that are parameters, what stands for them on the way back. Chains
            of parameters are evaluated on it a second time.

    Returns:
        The program's outputs. The feedback of parameters that were computed on the way is added to
        `feedback`.
    """
    env: Values = dict(zip(level.program.inputs, inputs, strict=True))
    for equation in level.program.equations:
        values = [read(atom, env) for atom in equation.inputs]
        twins = [
            feedback.get(a, v) if not isinstance(a, Constant) else v
            for a, v in zip(equation.inputs, values)
        ]  # noqa: B905
        plan = level.loops.get(equation.outputs[0]) if equation.outputs else None
        if plan is not None:
            outputs = _loop(plan, kinds, values, feedback)
        elif equation.name in BILINEAR and variables(equation.inputs) and _is_site(equation, kinds):
            outputs = [_aligned(equation, values, twins)]
        else:
            outputs = bind(equation, values)
            if _is_chain(equation, kinds):
                feedback.update(zip(equation.outputs, bind(equation, twins), strict=True))
        env.update(zip(equation.outputs, outputs, strict=True))
    return [read(atom, env) for atom in level.program.outputs]


def _aligned(equation: Equation, values: Sequence[Any], twins: Sequence[Any]) -> Any:
    """A bilinear operation whose derivative by one operand takes the other's feedback."""

    @jax.custom_jvp
    def operation(values: Sequence[Any], twins: Sequence[Any]) -> Any:
        return bind(equation, values)[0]

    @operation.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        (values, twins), (moved, _) = primals, tangents
        first = bind(equation, [moved[0], twins[1]])[0]
        second = bind(equation, [twins[0], moved[1]])[0]
        return operation(values, twins), first + second

    return operation(list(values), [lax.stop_gradient(x) for x in twins])


def _loop(plan: LoopPlan, kinds: Kinds, values: Sequence[Any], feedback: Values) -> list[Any]:
    loop, body = plan.loop, plan.level.program
    first, last = loop.num_consts, loop.num_consts + loop.num_carry
    outer = list(zip(body.inputs, plan.equation.inputs, strict=True))

    def known(pairs: Sequence[tuple[Variable, Atom]]) -> Values:
        return {v: feedback[a] for v, a in pairs if not isinstance(a, Constant) and a in feedback}

    fixed = {v: x for v, x in known(outer[:last]).items() if kinds[v] is Kind.PARAMETER}
    stacked = list(plan.stacked.values())

    def step(carry: list[Any], slices: tuple[list[Any], Values]) -> tuple[list[Any], Any]:
        xs, own = slices
        inner = {**fixed, **own}
        outputs = forward_with_feedback(plan.level, kinds, [*values[:first], *carry, *xs], inner)
        return outputs[: loop.num_carry], (
            outputs[loop.num_carry :],
            {v: inner[v] for v in stacked},
        )

    carry, (ys, twins) = lax.scan(
        step,
        list(values[first:last]),
        (list(values[last:]), known(outer[last:])),
        loop.length,
        loop.reverse,
        loop.unroll,
    )
    feedback.update({o: twins[v] for o, v in plan.stacked.items()})
    feedback.update(known([(o, atom) for o, atom in plan.kept.items()]))
    return [*carry, *ys]


def _is_site(equation: Equation, kinds: Kinds) -> bool:
    return kinds[equation.outputs[0]] is Kind.MIXED and any(
        _is_parameter(a, kinds) for a in equation.inputs
    )


def _is_chain(equation: Equation, kinds: Kinds) -> bool:
    return any(kinds[v] is Kind.PARAMETER for v in equation.outputs)


def _is_parameter(atom: Atom, kinds: Kinds) -> bool:
    return not isinstance(atom, Constant) and kinds[atom] is Kind.PARAMETER
