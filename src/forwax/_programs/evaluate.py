"""Programs as ordinary traceable functions: one equation, a run of them, and noise let in between."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import Array
from jax.extend import source_info_util

from forwax import _mesh
from forwax._programs.program import Atom, Constant, Equation, Variable

Values: TypeAlias = dict[Variable, Any]


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Compute one equation's outputs as ordinary traceable JAX operations."""
    if equation.primitive is None:
        return list(values)
    with contextlib.ExitStack() as stack:
        if equation.origin is not None:
            info = equation.origin.source_info
            names = source_info_util.current_name_stack() + info.name_stack
            stack.enter_context(source_info_util.user_context(info.traceback, name_stack=names))
            stack.enter_context(equation.origin.ctx.manager)
        params = equation.primitive.get_bind_params(equation.params)
        out = equation.primitive.bind(*values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def read(atom: Atom, env: Mapping[Variable, Any]) -> Any:
    """The value of an atom."""
    return atom.value if isinstance(atom, Constant) else env[atom]


def evaluate(
    equations: Iterable[Equation],
    env: dict[Variable, Any],
    apply: Callable[[Equation, list[Any]], list[Any]] = bind,
) -> None:
    """Compute equations in order; their outputs are added to `env`."""
    for equation in equations:
        outputs = apply(equation, [read(atom, env) for atom in equation.inputs])
        env.update(zip(equation.outputs, outputs, strict=True))


@jax.custom_jvp
def inject(value: Array, noise: Array, time: Array) -> Array:
    """The value itself; its tangent gains the noise times the tangent of `time`."""
    return value


@inject.defjvp
def _inject_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    value, noise, _ = primals
    dvalue, _, dtime = tangents
    return value, dvalue + _mesh.vary(dtime.astype(noise.dtype) * noise, _mesh.axes(value))
