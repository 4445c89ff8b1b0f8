"""What a direction does not move stays still, also where a derivative is infinite: 0 · ∞ = 0."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax._programs.custom_rules import reads_its_trace
from forwax._programs.evaluate import Values, bind, evaluate, read
from forwax._programs.program import Equation, Loop, Program, is_inexact
from forwax._programs.tracing import trace
from forwax._tree import Tree

Objective = Callable[[Tree], tuple[Array, Tree]]


def with_still_entries(objective: Objective, params: Tree) -> Objective:
    """The objective, in whose derivatives an entry of a tangent that is 0 stays 0.

    JAX multiplies each tangent by the local derivative. Along a basis vector most of them are 0,
    and one infinite derivative would make the slopes of all other coordinates 0 · ∞, not a number.
    Inside `while_loop`, `cond` and functions with rules of their own tangents are JAX's.

    A loss that cannot be traced, or that nothing steep is in, comes back as it is.
    """
    try:
        traced = trace(objective, params)
    except jax.errors.ConcretizationTypeError:
        return objective
    if not traced.program.contains(lambda facts: facts.steep) or reads_its_trace(
        traced
    ):
        return objective

    def still(params: Tree) -> tuple[Array, Tree]:
        outputs = _run(traced.program, traced.arguments(params))
        return traced.out_tree.unflatten(outputs)

    return still


def _run(program: Program, values: Sequence[Any]) -> list[Any]:
    env: Values = dict(zip(program.inputs, values, strict=True))
    evaluate(program.equations, env, _apply)
    return [read(atom, env) for atom in program.outputs]


def _apply(equation: Equation, values: list[Any]) -> list[Any]:
    if equation.loop is not None:
        return _apply_loop(equation.loop, values)
    if equation.facts.steep and is_inexact(jax.typeof(values[0])):
        return [_steep(equation, values)]
    return bind(equation, values)


def _apply_loop(loop: Loop, values: list[Any]) -> list[Any]:
    consts, start, xs = loop.split(values)

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _run(loop.body, [*consts, *carry, *xs])
        return loop.split_outputs(outputs)

    carry, stacked = loop.scan(step, start, xs)
    return [*carry, *stacked]


def _steep(equation: Equation, values: list[Any]) -> Any:
    """The result of a steep operation, which moves where one of its operands does."""

    def result(*values: Any) -> Any:
        return bind(equation, values)[0]

    function = jax.custom_jvp(result)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        out, moved = jax.jvp(result, primals, tangents)
        # those of integers have no numbers
        own = [t for t in tangents if is_inexact(jax.typeof(t))]
        moves = [jnp.broadcast_to(t != 0, out.shape) for t in own]
        return out, jnp.where(functools.reduce(operator.or_, moves), moved, 0)

    return function(*values)
