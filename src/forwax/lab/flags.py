"""How options read in `--help`, and what is said when one lies out of range."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

_T = TypeVar("_T")

Chosen = Annotated[_T | None, tyro.conf.arg(help_behavior_hint="")]
"""An option whose text says what holds where it is left out; "(default: None)" would say nothing.

Texts of options are one line each, since tyro keeps their line breaks.
"""


class UsageError(Exception):
    """Options that do not go together, in one sentence; the command line then exits with code 2.

    >>> raise UsageError("--steps must be at least 1, got 0.")
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: --steps must be at least 1, got 0.
    """


class DataError(Exception):
    """A data set that cannot be loaded: what was expected, what came, and what to do.

    Example:
        >>> raise DataError("Expected a folder of data sets at x, but there is none; create it.")
        Traceback (most recent call last):
        ...
        forwax.lab.flags.DataError: Expected a folder of data sets at x, but there is none;
        create it.
    """


@dataclass(frozen=True)
class Range:
    """What numbers an option takes: in words, and as a test. It stands in the option's type."""

    wanted: str
    holds: Callable[[Any], bool]


# JAX counts in 32 bits
_SMALL = Range("at most 2,147,483,647", lambda x: x < 2**31)
Count = Annotated[int, Range("at least 1", lambda x: x >= 1), _SMALL]
Positive = Annotated[float, Range("a positive number", lambda x: 0 < x < math.inf)]
AtLeastOne = Annotated[float, Range("at least 1", lambda x: 1 <= x < math.inf)]
CountOrNot = Chosen[Count]
PathOrNot = Chosen[Path]
_NOT_NEGATIVE = Range("zero or more", lambda x: 0 <= x < math.inf)
NotNegative = Annotated[float, _NOT_NEGATIVE]
Natural = Annotated[int, _NOT_NEGATIVE]


def check_ranges(options: Any) -> None:
    """Refuse options that lie out of the range in their type; what is left open (None) is in any.

    Raises:
        UsageError: naming the option, the range and what came.
    """
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for each in _ranges(kind):
            if value is not None and not each.holds(value):
                raise UsageError(f"{flag(name)} must be {each.wanted}, got {value}.")


def given(options: Any, names: Iterable[str]) -> dict[str, Any]:
    """Give those of the named options that are not left open, by name."""
    return {
        name: value for name in names if (value := getattr(options, name)) is not None
    }


def flag(name: str) -> str:
    """Give a field's option.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def _ranges(kind: Any) -> Iterator[Range]:
    for part in get_args(kind):
        if isinstance(part, Range):
            yield part
        else:
            yield from _ranges(part)
