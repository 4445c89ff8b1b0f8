"""What must be computed before what: a dependence that a compiler cannot remove, since it cannot know it to be idle."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh


def behind(value: Any, others: Iterable[Array]) -> Array:
    """The value itself, but computed after the others: it is chosen by a condition on them that never holds.

    `jax.lax.optimization_barrier` says the same, but XLA on CPU drops it before it orders the
    operations. Where `jax.vmap` maps the others alone, the value stays as it is and waits for all
    of them. On several other devices the condition would have to be told to all of them, and the
    barrier it is.
    """
    value = jnp.asarray(value)
    if has_several_accelerators():
        over = _mesh.axes(value)
        return lax.optimization_barrier(
            (value, [other for other in others if _mesh.axes(other) <= over])
        )[0]
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):  # keys have no zero
        return value
    over = _mesh.axes(value)
    for other in others:
        if (
            other.size and _mesh.axes(other) <= over and not _mesh.is_split(other)
        ):  # its type stays as it is
            value = jnp.where(_any(_never(lax.stop_gradient(other))), jnp.zeros_like(value), value)
    return value


def has_several_accelerators() -> bool:
    """Whether arrays may be split over devices that need not be CPUs."""
    return jax.default_backend() != "cpu" and jax.device_count() > 1


def _never(x: Array) -> Array:
    """False, from one entry."""
    first = x[(0,) * x.ndim].real
    return (first != first) & (first > 0)  # not a number, and yet above zero


@jax.custom_batching.custom_vmap
def _any(flag: Array) -> Array:
    """The flag; under `jax.vmap` whether any of them is set."""
    return flag


@_any.def_vmap
def _any_vmap(axis_size: int, in_batched: list[bool], flags: Array) -> tuple[Array, bool]:
    return _any(jnp.any(flags, axis=0)), False
