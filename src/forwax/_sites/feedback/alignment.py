"""Feedback alignment: a forward pass whose reverse pass crosses products through fixed matrices."""

from collections.abc import Sequence

import jax
from jax import Array

from forwax._programs.evaluate import Values, read
from forwax._programs.program import Equation
from forwax._sites.feedback.crossing import WayBack, forward
from forwax._sites.model import Sites
from forwax._sites.passes.keep import value
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
            twins[v] = matrix

    def is_aligned(equation: Equation) -> bool:
        return equation.facts.bilinear and sites.products.is_product(equation)

    way = WayBack(sites.products, {}, is_aligned, twins)

    def one(mapped: Sequence[Array]) -> tuple[list[Array], Tree]:
        inputs = sites.traced.arguments(params, mapped)
        env, _ = forward(sites.level, inputs, way)
        outputs = [read(atom, env) for atom in sites.level.program.outputs]
        losses, aux = jax.tree.unflatten(sites.traced.out_tree, outputs)
        return losses, aux

    if sites.num_examples is not None:
        axes = list(sites.problem.mapped_axes)
        one = jax.vmap(one, (axes,), axis_size=sites.num_examples)
    losses, aux = one(list(sites.problem.mapped))
    return value(sites, losses), aux
