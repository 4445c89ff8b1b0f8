"""What must be computed before what: a dependence that a compiler cannot remove, since it cannot know it to be idle."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def behind(value: Any, others: Iterable[Array], axis_name: str | None = None) -> Array:
    """The value itself, but computed after the others: it is chosen by a condition on them that never holds.

    `jax.lax.optimization_barrier` says the same, but XLA on CPU drops it before it orders the operations.

    Args:
        value: an array.
        others: arrays.
        axis_name: an axis that `jax.vmap` maps the others along, but not the value.
    """
    value = jnp.asarray(value)
    for never in [_never(x) for x in others if x.size]:
        if axis_name is not None:
            never = lax.pmax(never.astype(jnp.float32), axis_name) > 0
        value = jnp.where(never, jnp.zeros_like(value), value)
    return value


def _never(x: Array) -> Array:
    """False, from one entry."""
    first = x[(0,) * x.ndim].real
    return (first != first) & (first > 0)  # noqa: PLR0124 (not a number, and yet above zero)
