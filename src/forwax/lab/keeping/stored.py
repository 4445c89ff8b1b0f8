"""What was stored is checked like what is typed: kinds, names and ranges, by the key's name."""

import reprlib
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from forwax.lab.flags import Range, UsageError
from forwax.lab.report import Json

_WORDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    Path: ((str,), "text"),
    dict: ((dict,), "an object"),
    list: ((list,), "a list"),
    type(None): ((type(None),), "null"),
}


def check_stored(path: Path, kinds: Json | type, values: Json) -> None:
    """Refuse values that are not of their kind, or lie out of its range.

    Args:
        path: the file that holds them.
        kinds: the type of each value by its key, none of which may be missing; or a class whose
            annotations say so, of which those that are there are checked.
        values: what was read.

    Raises:
        UsageError: naming file and key, what was expected and what came.

    >>> check_stored(Path("config.json"), {"steps": int}, {"steps": "many"})
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: config.json: steps must be a whole number, got 'many'.
    """
    if isinstance(kinds, type):
        kinds = get_type_hints(kinds, include_extras=True)
    else:
        for name in kinds:
            if name not in values:
                raise UsageError(f"{path}: {name} is missing.")
    told = fault(kinds, values)
    if told is not None:
        raise UsageError(f"{path}: {told}.")


def fault(kinds: Json, values: Json) -> str | None:
    """Say which value is not of its kind, and what it should be; None where all are."""
    for name, kind in kinds.items():
        wanted = _wanted(kind, values[name]) if name in values else None
        if wanted is not None:
            return f"{name} must be {wanted}, got {reprlib.repr(values[name])}"
    return None


def warn(sentence: str) -> None:
    """Say on the standard error what was damaged, and what became of it."""
    print(f"forwax: {sentence}", file=sys.stderr, flush=True)


def _wanted(kind: Any, value: Any) -> str | None:
    """Say in words what the value should be; None where it is that."""
    origin = get_origin(kind)
    parts = get_args(kind)
    if origin is Annotated:
        wanted = _wanted(parts[0], value)
        ranges = [each for each in parts if isinstance(each, Range)]
        if wanted is not None or value is None:
            return wanted
        return next((each.wanted for each in ranges if not each.holds(value)), None)
    if origin in (Union, types.UnionType):
        told = [_wanted(part, value) for part in parts]
        return None if None in told else told[0]
    if origin is Literal:
        return None if value in parts else f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        is_fine = isinstance(value, list) and not any(
            _wanted(parts[0], each) for each in value
        )
        return None if is_fine else f"a list of {_WORDS[parts[0]][1]}"
    if kind is Any:
        return None
    classes, words = _WORDS[origin or kind]
    return None if type(value) in classes else words


def refuse_changes(path: Path, before: Json, now: Json) -> None:
    """Refuse settings that are not those of the last sitting.

    Raises:
        UsageError: naming each setting, its old and its new value.

    >>> refuse_changes(Path("config.json"), {"seed": 0}, {"seed": 1})
    Traceback (most recent call last):
        ...
    forwax.lab.flags.UsageError: config.json was changed since forwax wrote it: seed was 0 and is
    1. Undo that, or start a new run.
    """
    changes = list(_changes(before, now))
    if changes:
        raise UsageError(
            f"{path} was changed since forwax wrote it: {'; '.join(changes)}. Undo that, or start "
            "a new run."
        )


def _changes(before: Json, now: Json) -> Iterable[str]:
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = (
            reprlib.repr(each[name]) if name in each else "missing"
            for each in (before, now)
        )
        if name not in before or name not in now or before[name] != now[name]:
            yield f"{name} was {old} and is {new}"
