"""Values that are constants of a derivative which a rule takes, and of no other."""

from typing import Any

import jax
from jax import Array
from jax.custom_derivatives import zero_from_primal

from forwax._programs.program import is_inexact


def constant_along(time: Array, value: Any) -> Any:
    """The value as a constant of the derivative by `time`.

    `lax.stop_gradient` would cut derivatives around that one too, which a user takes of an
    estimate, as a meta-gradient: they would be wrong without a word. They go through this one,
    since the derivative by `time` has replaced it by the plain value.
    """
    return _constant_along(value, time) if is_inexact(value) else value


@jax.custom_jvp
def _constant_along(value: Array, time: Array) -> Array:
    return value


def _without_tangent(
    primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Any]:
    value, _ = primals
    return value, zero_from_primal(value, symbolic_zeros=True)


_constant_along.defjvp(_without_tangent, symbolic_zeros=True)
