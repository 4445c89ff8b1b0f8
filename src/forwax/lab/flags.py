"""How options read in `--help`, and what is said when one lies out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro

from forwax.lab.catalogue.settings import UsageError

_T = TypeVar("_T")

Chosen = Annotated[_T | None, tyro.conf.arg(help_behavior_hint="")]
"""An option whose text says what holds where it is left out; "(default: None)" would say nothing.

Texts of options are one line each, since tyro keeps their line breaks.
"""


def check_range(options: Any, wanted: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Refuse options that lie out of range; one that is left open (None) is in any.

    Args:
        options: what holds them as attributes.
        wanted: the range in words.
        holds: whether a value lies in it.
        *names: those of the attributes.

    Raises:
        UsageError: naming the option, the range and what came.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, got {value}.")


def check_at_least_one(options: Any, *names: str) -> None:
    """Refuse options that are below 1; see `check_range`."""
    check_range(options, "at least 1", lambda value: value >= 1, *names)
