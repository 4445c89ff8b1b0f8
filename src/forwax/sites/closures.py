"""Whether the derivative rules of a traced program read values of the trace, which are gone once it is done."""

from collections.abc import Iterable
from typing import Any

import jax
from jax import Array

from forwax import _mesh
from forwax.pushforward import is_abstract
from forwax.sites.program import Equation, Program, Traced, bind, is_inexact, read


def reads_its_trace(traced: Traced) -> bool:
    """Whether the rule of some `jax.custom_jvp` function closes over a value that the traced function computed.

    `jax.jvp` of that function can use the value, and a program that was traced before cannot.
    """
    return any(
        is_abstract(value) and all(value is not known for known in traced.closed)
        for equation in _custom(traced.program)
        for value in _closed_over(equation, traced.types)
    )


def _custom(program: Program) -> Iterable[Equation]:
    for equation in program.equations:
        if equation.loop is not None:
            yield from _custom(equation.loop.body)
        elif equation.contains("custom_jvp_call"):
            yield equation


def _closed_over(equation: Equation, types: list[Any]) -> list[Any]:
    """What an operation's Jacobian-vector product reads beside its operands."""
    given = list(dict.fromkeys(equation.variables))
    moving = [v for v in given if is_inexact(types[v])]

    def product(*values: Array) -> list[Any]:
        env = dict(zip(given, values, strict=True))

        def outputs(*moved: Array) -> list[Any]:
            here = {**env, **dict(zip(moving, moved, strict=True))}
            return [
                x
                for x in bind(equation, [read(atom, here) for atom in equation.inputs])
                if is_inexact(x)
            ]

        at = [env[v] for v in moving]
        return jax.jvp(outputs, at, at)[1]

    specs = [_mesh.stand_in(types[v]) for v in given]
    return list(jax.make_jaxpr(product)(*specs).consts)
