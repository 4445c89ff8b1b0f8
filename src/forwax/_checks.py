"""Checks of what users pass: errors say what was expected, what came, and what to do."""

import dataclasses
import math
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def register_checked(cls: type[T]) -> type[T]:
    """Register a frozen dataclass as a pytree that is rebuilt without its `__post_init__`.

    Checks there are for users. Tools that rebuild trees put what they like in place of leaves, and
    of values without leaves: Orbax texts and options of its own.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = [f.name for f in fields if f.metadata.get("static")]
    dynamic = [f.name for f in fields if f.name not in static]

    def values(tree: T, names: Sequence[str]) -> tuple[Any, ...]:
        return tuple(getattr(tree, name) for name in names)

    def flatten(tree: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return values(tree, dynamic), values(tree, static)

    def flatten_with_keys(tree: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, rest = flatten(tree)
        keys = map(GetAttrKey, dynamic)
        return tuple(zip(keys, children, strict=True)), rest

    def unflatten(rest: Iterable[Any], children: Iterable[Any]) -> T:
        tree = object.__new__(cls)
        for names, given in ((dynamic, children), (static, rest)):
            for name, value in zip(names, given, strict=True):
                object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def check_count(name: str, field: str, value: Any) -> int:
    """A static count, such as those of `numpy.arange`, as an integer of Python.

    Raises:
        ValueError: unless it is a positive integer.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool | np.bool) or count < 1:
        raise ValueError(
            f"{name}: expected {field} to be a positive integer, got {value!r}."
        )
    return count


def set_counts(value: Any, *fields: str, or_none: str = "") -> None:
    """Check the counts of a frozen dataclass, and keep them as integers of Python.

    Args:
        value: the dataclass.
        fields: the names of the counts.
        or_none: the name of one more, which may be None.
    """
    given = list(fields)
    if or_none and getattr(value, or_none) is not None:
        given.append(or_none)
    for field in given:
        count = check_count(type(value).__name__, field, getattr(value, field))
        object.__setattr__(value, field, count)


def check_no_text(value: Any, *fields: str) -> None:
    """Raise a TypeError for text in place of a number or array."""
    for field in fields:
        given = getattr(value, field)
        if isinstance(given, str):
            raise TypeError(
                f"{type(value).__name__}: expected {field} to be a number or an array, got "
                f"{given!r}."
            )


def check_argnums(name: str, argnums: Any) -> int | tuple[int, ...]:
    """Which arguments are differentiated, as integers of Python.

    Raises:
        TypeError: for what is no integer and no sequence of them.
        ValueError: for no argument at all.
    """
    is_several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
    numbers: list[Any] = list(argnums) if is_several else [argnums]
    if not numbers:
        raise ValueError(
            f"{name}: expected at least one argument in argnums, got {argnums!r}. 0 is the first."
        )
    try:
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        found = tuple(operator.index(number) for number in numbers)
    except TypeError:
        raise TypeError(
            f"{name}: expected argnums to be an integer or a tuple of integers, got {argnums!r}. "
            "They count the loss's own positional arguments: 0 is the first."
        ) from None
    return found if is_several else found[0]


def check_rate(name: str, field: str, rate: Any, *, signed: bool = False) -> None:
    """Raise for a learning rate that is no number, not finite or negative; arrays may be traced.

    Where it is signed it may be negative.
    """
    if isinstance(rate, jax.Array | np.ndarray):
        if rate.shape != ():
            raise TypeError(
                f"{name}: expected {field} to be a number or a scalar array, got an array of shape "
                f"{rate.shape}."
            )
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number):
        raise TypeError(
            f"{name}: expected {field} to be a number or a scalar array, got {rate!r}. Of a "
            "schedule pass what it gives for the step."
        )
    if signed and math.isfinite(rate):
        return
    if not 0 <= float(rate) < math.inf:
        raise ValueError(
            f"{name}: expected {field} of at least 0, got {rate}. A step goes down the loss by "
            "itself."
        )


def memory_limit() -> int | None:
    """The bytes of memory of the default device, of a CPU those of the machine; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # of systems that do not say
        return None
