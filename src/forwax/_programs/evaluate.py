"""Programs as ordinary traceable functions: one equation, a run of them, noise let in between."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax import Array
from jax.extend import source_info_util

from forwax import _mesh
from forwax._programs.program import Atom, Constant, Equation, Variable

PLACE = "in the loss "
"""How the note begins that says where an operation stands that raised an error."""

Values: TypeAlias = dict[Variable, Any]


NARROWED = "narrowed_by_forwax"
"""The name of the function below in a jaxpr."""


@functools.partial(jax.jit, static_argnums=1)
def narrowed_by_forwax(value: Array, dtype: Any) -> Array:
    """A value that is exact in a narrower type, in that type.

    `trace` knows it by its name: a cast back gives the value itself.
    """
    return value.astype(dtype)


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Compute one equation's outputs as ordinary traceable JAX operations."""
    primitive = equation.primitive
    if primitive is None:  # the identity that gives a parameter a noise of its own
        return [_mesh.vary(x, equation.params.get("over", ())) for x in values]
    if equation.facts.varies:  # a parameter's copy with own noise varies before
        return [_mesh.vary(x, equation.params["axes"]) for x in values]
    with contextlib.ExitStack() as stack:
        if equation.origin is not None:
            _enter_origin(equation.origin, stack)
        params = primitive.get_bind_params(equation.params)
        try:
            out = primitive.bind(*values, **params)
        except (NotImplementedError, ValueError) as error:
            if equation.source:
                error.add_note(f"{PLACE}at {equation.source}")
            raise
    return list(out) if primitive.multiple_results else [out]


def _enter_origin(eqn: Any, stack: contextlib.ExitStack) -> None:
    """Bind as where the user's code did: errors and profiles name that place."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    place = source_info_util.user_context(info.traceback, name_stack=names)
    stack.enter_context(place)
    stack.enter_context(eqn.ctx.manager)


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
        values = [read(atom, env) for atom in equation.inputs]
        outputs = apply(equation, values)
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
    # Noise that all devices of a mesh axis share must vary where the value does.
    moved = dtime.astype(noise.dtype) * noise
    return value, dvalue + _mesh.vary(moved, _mesh.axes(value))
