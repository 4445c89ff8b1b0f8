"""What must be computed before what: a dependence that a compiler cannot know to be idle."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh


def behind(value: Any, others: Iterable[Array]) -> Array:
    """The value itself, chosen by a condition on the others that never holds: computed after them.

    `jax.lax.optimization_barrier` says the same, but XLA on CPU drops it before it orders the
    operations. Where `jax.vmap` maps the others alone, the value stays as it is and waits for all
    of them. On several other devices the condition would have to be told to all of them, and the
    barrier it is.
    """
    value = jnp.asarray(value)
    axes = _mesh.axes(value)
    # A value may wait for what varies over its own mesh axes alone: else its type would change.
    inside = [other for other in others if _mesh.axes(other) <= axes]
    if has_several_accelerators():
        value, _ = lax.optimization_barrier((value, inside))
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):  # keys have no zero
        return value
    for other in inside:
        if other.size and not _mesh.is_split(other):
            # The condition has no derivatives, so that tangents go past it.
            condition = _any(_never(lax.stop_gradient(other)))
            value = jnp.where(condition, jnp.zeros_like(value), value)
    return value


def has_several_accelerators() -> bool:
    """Whether arrays may be split over devices that need not be CPUs."""
    return jax.default_backend() != "cpu" and jax.device_count() > 1


def _never(x: Array) -> Array:
    """False, from one entry."""
    origin = (0,) * x.ndim
    first = x[origin].real
    is_nan = first != first
    return is_nan & (first > 0)  # no compiler knows that this excludes the other


@jax.custom_batching.custom_vmap
def _any(flag: Array) -> Array:
    """The flag; under `jax.vmap` whether any of them is set."""
    return flag


@_any.def_vmap
def _any_vmap(
    axis_size: int, in_batched: list[bool], flags: Array
) -> tuple[Array, bool]:
    return _any(jnp.any(flags, axis=0)), False
