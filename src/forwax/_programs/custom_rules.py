"""Custom derivative rules of the user: those that forward mode cannot follow, and functions that close over a trace."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.extend import source_info_util

from forwax import _mesh, _tree
from forwax._programs.evaluate import bind, read
from forwax._programs.primitives import facts_of
from forwax._programs.program import Equation, Program, Traced, equations_of, is_inexact
from forwax._signature import Problem


def custom_vjp_error(equation: Any) -> TypeError:
    """The error that names the function of a jaxpr's custom_vjp equation, its place, and the ways out."""
    inner = equation.params["call_jaxpr"]
    name = getattr(inner, "jaxpr", inner).debug_info.func_src_info
    source = source_info_util.summarize(equation.source_info)
    place = f" (called at {source})" if source else ""
    return TypeError(
        f"forwax: the loss calls the jax.custom_vjp function {name}{place} on values that depend "
        f"on the parameters, "
        "but a custom_vjp function has no JVP, which forward gradients need. Write its rule as a "
        "jax.custom_jvp, or "
        "use forwax.FiniteDifference, which needs no derivative rule."
    )


def named(error: TypeError, problem: Problem) -> TypeError:
    """JAX's own error on a custom_vjp function, with the function's name; every other error as it is."""
    if "custom_vjp" not in str(error) or str(error).startswith("forwax"):
        return error
    found = _find(jax.make_jaxpr(problem.objective)(problem.params))
    return error if found is None else custom_vjp_error(found)


def check_inside(equation: Any, moved: Sequence[bool]) -> None:
    """Raise `custom_vjp_error` if a derivative by some operands of a jaxpr's equation meets a custom_vjp inside it.

    Args:
        equation: one that carries jaxprs, such as `cond` and `while`.
        moved: which of its operands depend on the parameters.

    Under `jit` JAX itself would only find out when it lowers the whole program. Under `vmap` it
    does at once.
    """
    found = next(filter(None, map(_find, jex.jaxprs_in_params(equation.params))), None)
    if found is None:
        return
    specs = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.invars]
    chosen = [
        i
        for i, (spec, move) in enumerate(zip(specs, moved, strict=True))
        if move and _is_inexact(spec)
    ]
    params = equation.primitive.get_bind_params(equation.params)

    def push(values: list[Any], tangents: list[Any]) -> Any:
        def apply(part: list[Any]) -> Any:
            whole = list(values)
            for i, value in zip(chosen, part, strict=True):
                whole[i] = value
            return equation.primitive.bind(*whole, **params)

        return jax.jvp(apply, ([values[i] for i in chosen],), (tangents,))

    tangents = [jax.ShapeDtypeStruct((1, *specs[i].shape), specs[i].dtype) for i in chosen]
    try:
        jax.eval_shape(jax.vmap(push, (None, 0)), specs, tangents)
    except (
        TypeError,
        ValueError,
    ) as error:  # all others are about this trial: inside shard_map it lacks mesh axes
        if "custom_vjp" in str(error):
            raise custom_vjp_error(found) from error


def _is_inexact(spec: Any) -> bool:
    return jnp.issubdtype(spec.dtype, jnp.inexact)


def _find(jaxpr: Any) -> Any:
    return next((eqn for eqn in equations_of(jaxpr) if facts_of(eqn.primitive).lacks_jvp), None)


def reads_its_trace(traced: Traced) -> bool:
    """Whether the rule of some `jax.custom_jvp` function closes over a value that the traced function computed.

    `jax.jvp` of that function can use the value, and a program that was traced before cannot.
    """
    return any(
        _tree.is_abstract(value) and all(value is not known for known in traced.closed)
        for equation in _custom(traced.program)
        for value in _closed_over(equation, traced.types)
    )


def _custom(program: Program) -> Iterable[Equation]:
    for equation in program.equations:
        if equation.loop is not None:
            yield from _custom(equation.loop.body)
        elif equation.contains(lambda facts: facts.has_own_jvp):
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
