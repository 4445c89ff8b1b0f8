"""What a value varies over inside `jax.shard_map`, and the sums and casts that follow from it.

Outside `shard_map`, and with `check_vma=False`, nothing varies and every function here is the
identity.
"""

import math
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
    manual = getattr(aval, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    # Older jax has no `manual_axis_type`, but `vma` alone.
    return frozenset(getattr(aval, "vma", ()))


def like(shape: tuple[int, ...], dtype: Any, over: Axes) -> Any:
    """What stands for an array of this type: a spec, or zeros where it varies over mesh axes."""
    if not over:
        return jax.ShapeDtypeStruct(shape, dtype)
    # A spec cannot say over which mesh axes an array varies.
    return vary(jnp.zeros(shape, dtype), over)


def stand_in(aval: Any) -> Any:
    """What stands for an array of an abstract type: as `like`, and split as the type is."""
    if _is_split(aval):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)
    return like(tuple(aval.shape), aval.dtype, type_axes(aval))


def tree_axes(tree: Any) -> list[Axes]:
    """The varying axes of every leaf."""
    return [axes(leaf) for leaf in jax.tree.leaves(tree)]


def all_axes(tree: Any) -> Axes:
    """The mesh axes over which any leaf varies."""
    return frozenset().union(*tree_axes(tree))


def size(over: Iterable[str]) -> int:
    """The number of devices along mesh axes."""
    # The sum of a constant over devices is a constant too.
    return math.prod(lax.psum(1, name) for name in over)


def mean(x: Array, over: Iterable[str]) -> Array:
    """The mean of a value over those of the mesh axes over which it varies."""
    axes_of_mean = set(over) & axes(x)
    return total(x, axes_of_mean) / size(axes_of_mean)


def is_split(x: Any) -> bool:
    """Whether a value's type says that it is split over explicit axes of `jax.make_mesh`."""
    return _is_split(jax.typeof(x))


def _is_split(aval: Any) -> bool:
    sharding: Any = getattr(aval, "sharding", None)
    # One entry for each array axis: None, the name of a mesh axis, or several names.
    names: list[str] = []
    for entry in getattr(sharding, "spec", ()):
        if isinstance(entry, tuple):
            names.extend(entry)
        elif entry is not None:
            names.append(entry)
    # What is split over a mesh axis of one device is whole.
    return any(sharding.mesh.shape[name] > 1 for name in names)


def vary(x: Array, over: Iterable[str]) -> Array:
    """Cast a value to vary over further mesh axes."""
    missing = set(over) - axes(x)
    if not missing:
        return x
    return lax.pcast(x, tuple(sorted(missing)), to="varying")


def total(x: Array, over: Iterable[str]) -> Array:
    """Sum a value over those of the mesh axes over which it varies."""
    summed = set(over) & axes(x)
    if not summed:
        return x
    return lax.psum(x, tuple(sorted(summed)))


def gathered(x: Array, over: Iterable[str], axis: int = 0) -> Array:
    """The values of all devices along mesh axes, side by side on one array axis, for all alike."""
    for name in sorted(over):
        to = "invarying" if name in axes(x) else "varying"
        x = lax.all_gather(x, name, axis=axis, tiled=True, to=to)
    return x


def side_by_side(x: Array, axis: str | tuple[str, ...]) -> Array:
    """As `gathered` on the first array axis, in the order of `lax.axis_index` of the mesh axes."""
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    is_tracked = bool(axes(lax.axis_index(names)))
    if is_tracked:
        x = vary(x, names)
    to = "invarying" if is_tracked else "varying"
    return lax.all_gather(x, names, tiled=True, to=to)


def reduced(x: Array, to: Axes) -> Array:
    """A value over exactly the given mesh axes: summed over its others, cast to those it lacks."""
    others = axes(x) - to
    return vary(total(x, others), to)


def own_key(key: Array, over: Iterable[str]) -> Array:
    """A key of its own for each index along mesh axes: different shards get independent noise."""
    for name in sorted(over):
        key = jax.random.fold_in(key, lax.axis_index(name))
    return key
