"""Feedback alignment: a forward pass whose reverse pass crosses products through fixed matrices."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax

from forwax._programs.evaluate import Values, bind, read
from forwax._programs.program import Atom, Constant, Equation, Variable
from forwax._sites.kinds import Kind
from forwax._sites.levels import Kinds, Level, LoopPlan
from forwax._sites.model import Sites
from forwax._sites.passes.keep import value
from forwax._tree import Tree


def aligned(sites: Sites, params: Tree, feedback: Sequence[Array | None]) -> tuple[Array, Tree]:
    """`(value, aux)`, whose reverse pass crosses dots and convolutions through the feedback; None: as they are."""
    leaves = jax.tree.leaves(params)
    start = len(sites.traced.closed)
    names = sites.level.program.inputs[start : start + len(leaves)]
    twins = {v: lax.stop_gradient(x) for v, x in zip(names, feedback, strict=True) if x is not None}

    def one(mapped: Sequence[Array]) -> tuple[list[Array], Tree]:
        inputs = [*sites.traced.closed, *leaves, *mapped]
        outputs = forward_with_feedback(sites.level, sites.kinds, inputs, dict(twins))
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs)
        return losses, aux

    if sites.num_examples is not None:
        one = jax.vmap(one, (list(sites.problem.mapped_axes),), axis_size=sites.num_examples)
    losses, aux = one(list(sites.problem.mapped))
    return value(sites, losses), aux


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
        plan = level.loop_of(equation)
        if plan is not None:
            outputs = _loop(plan, kinds, values, feedback)
        elif equation.facts.bilinear and equation.variables and _is_site(equation, kinds):
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
    feedback.update(known([(o, atom) for o, atom in plan.unchanged.items()]))
    return [*carry, *ys]


def _is_site(equation: Equation, kinds: Kinds) -> bool:
    return kinds[equation.outputs[0]] is Kind.MIXED and any(
        _is_parameter(a, kinds) for a in equation.inputs
    )


def _is_chain(equation: Equation, kinds: Kinds) -> bool:
    return any(kinds[v] is Kind.PARAMETER for v in equation.outputs)


def _is_parameter(atom: Atom, kinds: Kinds) -> bool:
    return not isinstance(atom, Constant) and kinds[atom] is Kind.PARAMETER
