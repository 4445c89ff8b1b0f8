"""Rules by the names of two commands: `forward-16` of `compare`, `LG-FG-A:4:normal` of `reproduce`.

One line of `LINES` adds a rule to `compare` and `diagnose`; the rows of `reproduce` are the methods
of Ren et al. 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from forwax.lab import style
from forwax.lab.catalogue.columns import Column, row_of
from forwax.lab.catalogue.rules import RULES, TANGENTS
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import UsageError
from forwax.lab.report import Json
from forwax.lab.terminal import meant
from forwax.models import ren2023

MANY = 16
"""The tangents of a many-tangent rule whose name has no number."""

CHUNK = 4
"""The most tangents that a mean pushes forward at once.

On a CPU that is faster than all sixteen, and takes less memory.
"""


@dataclass(frozen=True)
class NamedRule:
    """A rule of the table, or of a comparison.

    Attributes:
        about: what it is, for people; in the table {k} stands for the number of tangents.
        given: the settings that make it, by field of `Settings`.
        tangents: how many tangents it draws without a number in its name; None where it draws none.
        colour: in the table a name of `forwax.lab.style.PALETTE`, by default the rule's own, or the
            next free one; in a comparison the colour itself.
        name: in a comparison the one that was asked for.
        dashes: in a comparison those of its line.

    >>> LINES["backprop"].tangents is None
    True
    """

    about: str
    given: Json
    tangents: int | None = None
    colour: str | None = None
    name: str = ""
    dashes: str = "-"


def _by(rule: str, tangents: str = "rademacher", combine: str = "mean") -> Json:
    return {"rule": rule, "tangents": tangents, "combine": combine}


LINES: Mapping[str, NamedRule] = {
    "backprop": NamedRule("backprop", {"rule": "backprop"}),
    "forward": NamedRule("forward gradient, {k}", _by("weight"), 1),
    "forward-normal": NamedRule(
        "forward gradient, {k}, normal", _by("weight", "normal"), 1, "value"
    ),
    "low-rank": NamedRule("rank-1 forward gradient, {k}", _by("weight", "low-rank"), 1),
    "projection": NamedRule(
        "projection, {k}", _by("weight", combine="projection"), MANY
    ),
    "shrinkage": NamedRule("shrinkage, {k}", _by("weight", combine="shrinkage"), MANY),
    "orthonormal": NamedRule("orthonormal, {k}", _by("weight", "orthonormal"), MANY),
    "finite-difference": NamedRule(
        "finite differences, {k}", _by("finite-difference"), 1
    ),
    "activity": NamedRule("activity noise, {k}", _by("activity"), 1),
    "feedback": NamedRule("feedback alignment", {"rule": "feedback"}),
    "direct-feedback": NamedRule(
        "direct feedback alignment", {"rule": "direct-feedback"}
    ),
    "learned-feedback": NamedRule("learned feedback", {"rule": "learned-feedback"}),
    "exact": NamedRule("exact, forward mode", {"rule": "exact"}),
}
"""Every rule by its name; `NAME-K` is the same with K tangents, such as forward-16."""


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
    base = name
    said = None
    if name not in LINES:
        base, _, number = name.rpartition("-")
        said = int(number) if number.isdecimal() else 0
    line = LINES.get(base)
    if line is None or said == 0 or (said and line.tangents is None):
        raise UsageError(
            f"There is no rule {name!r}; choose --rules from: {', '.join(LINES)}; those with "
            "tangents may be followed by their number, such as forward-16."
            f"{meant(name, LINES)}"
        )
    count = said or line.tangents
    given = dict(line.given)
    if count is not None:
        given["num_tangents"] = count
        chunks = (
            "chunk_size" in RULES[given["rule"]].takes and given["combine"] == "mean"
        )
        if count > CHUNK and chunks:
            given["chunk_size"] = CHUNK
    about = line.about.format(k=f"{count} tangent" + ("" if count == 1 else "s"))
    colour = line.colour or ("forward-16" if base == "forward" and count != 1 else base)
    # the same colour as without the number, hence dashes
    dashes = "--" if count != line.tangents and colour == base else "-"
    return NamedRule(about, given, count, style.colour(colour, index), name, dashes)


def parse_all(names: tuple[str, ...]) -> list[NamedRule]:
    """Read the rules of a comparison, in their order.

    Raises:
        UsageError: when there is none, when one is unknown or comes twice.

    >>> [rule.name for rule in parse_all(("backprop", "forward-16"))]
    ['backprop', 'forward-16']
    """
    if not names:
        raise UsageError("--rules must name at least one rule.")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--rules names {name} twice; name each rule once.")
    return [parse(name, index) for index, name in enumerate(names)]


@dataclass(frozen=True)
class Entry:
    """A row of a reproduction.

    Attributes:
        rule: a method of the paper.
        num_tangents: how many noises each step draws; None for a rule without noise.
        tangents: their distribution; without another word signs, orthogonal to each other where
            there are several.
        parts: whether each patch and group has its own slope.

    >>> Entry.parse("LG-FG-A:4:normal")
    Entry(rule='LG-FG-A', num_tangents=4, tangents='normal', parts=True)
    """

    rule: str
    num_tangents: int | None = None
    tangents: str | None = None
    parts: bool = True

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read "RULE", or a forward gradient as "RULE:NUMBER:DISTRIBUTION:one-slope" in part.

        Raises:
            UsageError: when the rule or one of the words is unknown, or two words say the same
                thing.
        """
        rule, *words = text.split(":")
        if rule not in ren2023.NAMES:
            raise UsageError(
                f"There is no rule {rule!r} in Ren et al. 2023; choose from: "
                f"{', '.join(ren2023.NAMES)}."
            )
        if not ren2023.READINGS[rule].draws_noise:
            if words:
                raise UsageError(
                    f"{rule} draws no noise, so that {text!r} means nothing; write {rule}."
                )
            return cls(rule)
        given: Json = dict(_read(word, text) for word in words)
        if len(given) < len(words):
            raise UsageError(
                f"{text!r} says twice how many noises, of which kind or one-slope; say each once."
            )
        given.setdefault("tangents", _signs(given.setdefault("num_tangents", 1)))
        return cls(rule, **given)

    @property
    def name(self) -> str:
        """The row's name, which `parse` reads.

        >>> Entry.parse("LG-FG-A:normal").name, Entry.parse("FG-A:8").name
        ('LG-FG-A:normal', 'FG-A:8')
        """
        words = [row_of(self)]
        if self.tangents not in (None, _signs(self.num_tangents)):
            words.append(self.tangents)
        return ":".join(words if self.parts else [*words, "one-slope"])

    def settings(self, column: Column, num_examples: int, **changes: Any) -> Settings:
        """The settings of this row in a column.

        Args:
            column: the column.
            num_examples: the size of the training set.
            changes: settings to change, and `epochs`, for those of the column.
        """
        rate, epochs = column.of_row(row_of(self))
        epochs = changes.pop("epochs", epochs)
        own = asdict(self) | {"learning_rate": rate}
        settings = replace(column.settings, **own | changes)
        if "steps" not in changes:
            steps = epochs * max(1, num_examples // settings.batch_size)
            settings = replace(settings, steps=steps)
        return column.warmed_up(settings)


def _read(word: str, text: str) -> tuple[str, Any]:
    """What a word after a rule sets, and to what."""
    known = [name for name in TANGENTS if name not in ("guided", "sparse")]
    if word.isdecimal() and int(word):
        return "num_tangents", int(word)
    if word == "one-slope":
        return "parts", False
    if word in known:
        return "tangents", word
    raise UsageError(
        f"{text!r}: expected a number of noises, one-slope or one of {', '.join(known)}."
    )


def _signs(num_tangents: int | None) -> str:
    """The signs that a row draws by default."""
    return "hadamard" if (num_tangents or 1) > 1 else "rademacher"
