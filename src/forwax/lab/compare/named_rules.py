"""The rules that `forwax compare` knows by name: one line adds one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forwax.lab import choices, style
from forwax.lab.settings import UsageError

MANY = 16
"""The tangents of a many-tangent rule whose name has no number."""

CHUNK = 4
"""The most tangents that a mean pushes forward at once: on a CPU faster than all sixteen, and in less memory."""


@dataclass(frozen=True)
class Line:
    """A rule of the table.

    Attributes:
        about: what it is, for people; {k} stands for the number of tangents.
        settings: the settings that make it, by field of `forwax.lab.settings.Settings`.
        tangents: how many tangents it draws without a number in its name; None where it draws none.
        colour: a name of `forwax.lab.style.PALETTE`; by default the rule's own, or the next free
            one.

    >>> LINES["backprop"].tangents is None
    True
    """

    about: str
    settings: Mapping[str, Any]
    tangents: int | None = None
    colour: str | None = None


_SIGNS = {"rule": "weight", "tangents": "rademacher"}

LINES: Mapping[str, Line] = {
    "backprop": Line("backprop", {"rule": "backprop"}),
    "forward": Line("forward gradient, {k}", {**_SIGNS, "combine": "mean"}, 1),
    "forward-normal": Line(
        "forward gradient, {k}, normal",
        {"rule": "weight", "tangents": "normal", "combine": "mean"},
        1,
        "value",
    ),
    "low-rank": Line(
        "rank-1 forward gradient, {k}",
        {"rule": "weight", "tangents": "low-rank", "combine": "mean"},
        1,
    ),
    "projection": Line("projection, {k}", {**_SIGNS, "combine": "projection"}, MANY),
    "shrinkage": Line("shrinkage, {k}", {**_SIGNS, "combine": "shrinkage"}, MANY),
    "orthonormal": Line(
        "orthonormal, {k}",
        {"rule": "weight", "tangents": "orthonormal", "combine": "mean"},
        MANY,
    ),
    "finite-difference": Line(
        "finite differences, {k}",
        {"rule": "finite-difference", "tangents": "rademacher", "combine": "mean"},
        1,
    ),
    "activity": Line(
        "activity noise, {k}",
        {"rule": "activity", "tangents": "rademacher", "combine": "mean"},
        1,
    ),
    "feedback": Line("feedback alignment", {"rule": "feedback"}),
    "direct-feedback": Line("direct feedback alignment", {"rule": "direct-feedback"}),
    "exact": Line("exact, forward mode", {"rule": "exact"}),
}
"""Every rule by its name; `NAME-K` is the same with K tangents, such as forward-16."""

DEFAULT_RULES = ("backprop", "forward", "forward-16", "projection")
PAPER_RULES = ("backprop", "forward-normal", "forward")


@dataclass(frozen=True)
class NamedRule:
    """One rule of a comparison: its name on the command line, what it is, its settings, its colour and its dashes."""

    name: str
    about: str
    given: Mapping[str, Any]
    colour: str
    dashes: str


def parse(name: str, index: int = 0) -> NamedRule:
    """Read a rule's name, with or without a number of tangents.

    Args:
        name: a name of `LINES`, or one followed by a hyphen and the number of tangents.
        index: its place among the rules compared, for the colour of a name without its own.

    Raises:
        UsageError: when there is no such rule, or it draws no tangents.

    >>> parse("projection-4").given["num_tangents"], parse("forward").about
    (4, 'forward gradient, 1 tangent')
    """
    base, _, number = name.rpartition("-")
    if name in LINES:
        base, count = name, LINES[name].tangents
    elif (
        base in LINES
        and number.isdecimal()
        and LINES[base].tangents is not None
        and int(number) >= 1
    ):
        count = int(number)
    else:
        raise UsageError(
            f"There is no rule {name!r}; choose --rules from: {', '.join(LINES)}; those with "
            f"tangents may be followed "
            "by their number, such as forward-16."
        )
    line, given = LINES[base], dict(LINES[base].settings)
    if count is not None:
        given["num_tangents"] = count
        if (
            count > CHUNK
            and given["combine"] == "mean"
            and "chunk_size" in choices.RULES[given["rule"]].takes
        ):
            given["chunk_size"] = CHUNK
    tangents = f"{count} tangent" + ("" if count == 1 else "s")
    colour = line.colour or ("forward-16" if base == "forward" and count != 1 else base)
    dashes = "--" if count is not None and count != line.tangents and colour == base else "-"
    return NamedRule(
        name, line.about.format(k=tangents), given, style.colour(colour, index), dashes
    )


def parse_all(names: tuple[str, ...]) -> list[NamedRule]:
    """Read the rules of a comparison, in their order.

    Raises:
        UsageError: when there is none, when one is unknown or comes twice.

    >>> [rule.name for rule in parse_all(("backprop", "forward-16"))]
    ['backprop', 'forward-16']
    """
    if not names:
        raise UsageError("--rules must name at least one rule.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--rules names {twice} twice; name each rule once.")
    return [parse(name, index) for index, name in enumerate(names)]
