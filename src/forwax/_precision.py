"""Parameters in half precision: gradients that are wider than they."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _tree
from forwax._programs.evaluate import narrowed_by_forwax
from forwax._signature import Problem
from forwax._tree import Tree


def check_dtype(dtype: Any) -> None:
    """Raise a TypeError unless gradients can come in a type; None leaves theirs as it is."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "value_and_grad: expected gradient_dtype to be a floating type, such as jnp.float32, "
            f"got {dtype!r}."
        )


def widened(problem: Problem, dtype: Any) -> Problem:
    """The problem with parameters in at least this type, which the loss gets in their own.

    Gradients have the types of the parameters. What is cast is exact in both, so that programs that
    cast it back, as a loss does that computes in float32, are those of wide parameters.
    """
    params = problem.params
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
    if dtype is None or all(_tree.promoted(own, dtype) == own for own in dtypes):
        return problem

    def narrow(params: Tree) -> Tree:
        leaves = [
            leaf if leaf.dtype == own else narrowed_by_forwax(leaf, own)
            for leaf, own in zip(jax.tree.leaves(params), dtypes, strict=True)
        ]
        return _tree.with_leaves(params, leaves)

    def objective(params: Tree) -> tuple[Array, Tree]:
        return problem.objective(narrow(params))

    def example(params: Tree, *slices: Array) -> tuple[list[Array], Tree]:
        return problem.example(narrow(params), *slices)

    wide = jax.tree.map(lambda x: x.astype(_tree.promoted(x.dtype, dtype)), params)
    return dataclasses.replace(
        problem,
        params=wide,
        objective=objective,
        example=example,
        narrow=narrow,
    )
