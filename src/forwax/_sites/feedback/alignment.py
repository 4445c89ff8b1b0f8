"""Feedback alignment: a forward pass whose reverse pass crosses products through fixed matrices."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax

from forwax._programs.evaluate import Values, bind, read
from forwax._programs.program import Atom, Constant, Equation, Variable
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.model import Sites
from forwax._sites.passes.keep import value
from forwax._sites.products import Products
from forwax._tree import Tree


def aligned(
    sites: Sites,
    params: Tree,
    feedback: Sequence[Array | None],
) -> tuple[Array, Tree]:
    """`(value, aux)`; errors cross dots and convolutions through the feedback.

    None stands for a parameter that is its own feedback.
    """
    twins: Values = {}
    for v, matrix in zip(sites.traced.parameters, feedback, strict=True):
        if matrix is not None:
            twins[v] = lax.stop_gradient(matrix)

    def one(mapped: Sequence[Array]) -> tuple[list[Array], Tree]:
        inputs = sites.traced.arguments(params, mapped)
        outputs = forward_with_feedback(
            sites.level,
            sites.products,
            inputs,
            dict(twins),  # it grows on the way
        )
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs)
        return losses, aux

    if sites.num_examples is not None:
        axes = list(sites.problem.mapped_axes)
        one = jax.vmap(one, (axes,), axis_size=sites.num_examples)
    losses, aux = one(list(sites.problem.mapped))
    return value(sites, losses), aux


def forward_with_feedback(
    level: Level,
    products: Products,
    inputs: Sequence[Any],
    feedback: Values,
) -> list[Any]:
    """Evaluate a level so that errors cross its dots and convolutions through the feedback.

    Args:
        level: what to evaluate.
        products: where trained weights meet data.
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
        plan = level.loop_of(equation)
        if plan is not None:
            outputs = _loop(plan, products, values, feedback)
        elif equation.facts.bilinear and products.is_product(equation):
            twins = _twins(equation, values, feedback)
            outputs = [_aligned(equation, values, twins)]
        else:
            outputs = bind(equation, values)
            if products.makes_weights(equation):
                # What is done to a weight before it is used is done to its feedback too.
                twins = _twins(equation, values, feedback)
                computed = bind(equation, twins)
                feedback.update(zip(equation.outputs, computed, strict=True))
        env.update(zip(equation.outputs, outputs, strict=True))
    return [read(atom, env) for atom in level.program.outputs]


def _twins(
    equation: Equation,
    values: Sequence[Any],
    feedback: Values,
) -> list[Any]:
    """What stands for an equation's inputs on the way back: the feedback, else the values."""
    twins = []
    for atom, twin in zip(equation.inputs, values, strict=True):
        if not isinstance(atom, Constant):
            twin = feedback.get(atom, twin)
        twins.append(twin)
    return twins


def _aligned(
    equation: Equation,
    values: Sequence[Any],
    twins: Sequence[Any],
) -> Any:
    """A bilinear operation whose derivative by one operand takes the other's feedback."""

    @jax.custom_jvp
    def operation(values: Sequence[Any], twins: Sequence[Any]) -> Any:
        return bind(equation, values)[0]

    @operation.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        values, twins = primals
        moved, _ = tangents
        # By the product rule, with the other operand's feedback in place of itself.
        (first,) = bind(equation, [moved[0], twins[1]])
        (second,) = bind(equation, [twins[0], moved[1]])
        return operation(values, twins), first + second

    fixed = [lax.stop_gradient(twin) for twin in twins]
    return operation(list(values), fixed)


def _loop(
    plan: LoopPlan,
    products: Products,
    values: Sequence[Any],
    feedback: Values,
) -> list[Any]:
    loop = plan.loop
    consts, first_carry, scanned = loop.split(values)
    inner_inputs = plan.level.program.inputs
    pairs = list(zip(inner_inputs, plan.equation.inputs, strict=True))
    const_pairs, carry_pairs, scanned_pairs = loop.split(pairs)

    def known(pairs: Sequence[tuple[Variable, Atom]]) -> Values:
        twins: Values = {}
        for v, atom in pairs:
            if not isinstance(atom, Constant) and atom in feedback:
                twins[v] = feedback[atom]
        return twins

    # A carry is a weight only if the body returns it as it is; so is its feedback.
    entering = known([*const_pairs, *carry_pairs])
    fixed = {v: twin for v, twin in entering.items() if products.is_made(v)}
    pairs_of_outputs = zip(plan.equation.outputs, loop.body.outputs, strict=True)
    handed_on, stacked = loop.split_outputs(list(pairs_of_outputs))
    inner_of = {outer: v for outer, v in stacked if products.is_made(outer)}

    def step(
        carry: list[Any],
        slices: tuple[list[Any], Values],
    ) -> tuple[list[Any], Any]:
        xs, twins_of_step = slices
        inner = {**fixed, **twins_of_step}
        inputs = [*consts, *carry, *xs]
        outputs = forward_with_feedback(plan.level, products, inputs, inner)
        carry, ys = loop.split_outputs(outputs)
        twins = {outer: read(v, inner) for outer, v in inner_of.items()}
        return carry, (ys, twins)

    slices = (scanned, known(scanned_pairs))
    carry, (ys, twins) = loop.scan(step, first_carry, slices)
    feedback.update(twins)
    for outer, v in handed_on:
        if not isinstance(v, Constant) and v in fixed:
            feedback[outer] = fixed[v]
    return [*carry, *ys]
