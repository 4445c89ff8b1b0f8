"""What a value varies over inside `jax.shard_map`, and the sums and casts that follow from it.

Outside `shard_map`, and with `check_vma=False`, nothing varies and every function here is the
identity.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Axes = frozenset[str]


def axes(x: Any) -> Axes:
    """The mesh axes over which a value varies."""
    return type_axes(jax.typeof(x))


def type_axes(aval: Any) -> Axes:
    """The mesh axes over which values of an abstract type vary."""
    manual = getattr(aval, "manual_axis_type", None)  # newer jax; older ones have vma alone
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def like(shape: tuple[int, ...], dtype: Any, over: Axes) -> Any:
    """What stands for an array of this type: a spec, or zeros if it varies over mesh axes, which a spec cannot say."""
    return vary(jnp.zeros(shape, dtype), over) if over else jax.ShapeDtypeStruct(shape, dtype)


def stand_in(aval: Any) -> Any:
    """What stands for an array of an abstract type: the same as `like`, split as the type says over explicit axes."""
    if _is_split(aval):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)
    return like(tuple(aval.shape), aval.dtype, type_axes(aval))


def tree_axes(tree: Any) -> list[Axes]:
    """The varying axes of every leaf."""
    return [axes(leaf) for leaf in jax.tree.leaves(tree)]


def is_split(x: Any) -> bool:
    """Whether a value's type says that it is split over explicit mesh axes, as `jax.make_mesh` makes them."""
    return _is_split(jax.typeof(x))


def _is_split(aval: Any) -> bool:
    sharding = getattr(aval, "sharding", None)
    named = [axes for axes in getattr(sharding, "spec", ()) if axes is not None]
    names = [name for axes in named for name in (axes if isinstance(axes, tuple) else (axes,))]
    return sharding is not None and any(sharding.mesh.shape[name] > 1 for name in names)


def vary(x: Array, over: Iterable[str]) -> Array:
    """Cast a value to vary over further mesh axes."""
    missing = tuple(sorted(set(over) - axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def total(x: Array, over: Iterable[str]) -> Array:
    """Sum a value over those of the mesh axes over which it varies."""
    names = tuple(sorted(set(over) & axes(x)))
    return lax.psum(x, names) if names else x


def reduced(x: Array, to: Axes) -> Array:
    """A value that varies over exactly the given mesh axes: summed over its others, cast to those it lacks."""
    return vary(total(x, axes(x) - to), to)


def own_key(key: Array, over: Iterable[str]) -> Array:
    """A key of its own for each index along mesh axes, so that different shards get independent noise."""
    for name in sorted(over):
        key = jax.random.fold_in(key, lax.axis_index(name))
    return key
