"""Rows of a reproduction: a method of the paper, and how many noises of which kind it draws."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.columns import DRAWING, RULES, Column
from forwax.lab.catalogue.settings import Settings, UsageError


@dataclass(frozen=True)
class Entry:
    """One row.

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
        """Read "RULE", or a forward gradient as "RULE:NUMBER", "RULE:DISTRIBUTION", "RULE:one-slope" or all of them.

        Raises:
            UsageError: when the rule or one of the words is unknown, or two words say the same
                thing.
        """
        rule, *words = text.split(":")
        if rule not in RULES:
            raise UsageError(
                f"There is no rule {rule!r} in Ren et al. 2023; choose from: {', '.join(RULES)}."
            )
        if rule not in DRAWING:
            if words:
                raise UsageError(
                    f"{rule} draws no noise, so that {text!r} means nothing; write {rule}."
                )
            return cls(rule)
        given: dict[str, Any] = {}
        for word in words:
            name, value = _read(word, text)
            if name in given:
                raise UsageError(
                    f"{text!r} says twice how many noises, of which kind or one-slope; say each "
                    f"once."
                )
            given[name] = value
        given = {"num_tangents": 1} | given
        given.setdefault("tangents", _signs(given["num_tangents"]))
        return cls(rule, **given)

    @property
    def name(self) -> str:
        """The row's name, which `parse` reads.

        >>> Entry.parse("LG-FG-A:normal").name, Entry.parse("FG-A:8").name
        ('LG-FG-A:normal', 'FG-A:8')
        """
        words = [self.row]
        words += (
            [self.tangents] if self.tangents not in (None, _signs(self.num_tangents or 1)) else []
        )
        return ":".join(words + ([] if self.parts else ["one-slope"]))

    @property
    def row(self) -> str:
        """The rule and the number of its noises, by which a column knows rates and epochs.

        >>> Entry.parse("FG-A:8:normal").row
        'FG-A:8'
        """
        return self.rule if (self.num_tangents or 1) == 1 else f"{self.rule}:{self.num_tangents}"

    def settings(self, column: Column, num_examples: int, **changes: Any) -> Settings:
        """The settings of this row in a column.

        Args:
            column: the column.
            num_examples: the size of the training set.
            changes: settings to change, and `epochs`, for those of the column.
        """
        epochs = changes.pop("epochs", None) or column.epochs_of(self.row)
        settings = dataclasses.replace(
            column.settings,
            rule=self.rule,
            num_tangents=self.num_tangents,
            tangents=self.tangents,
            parts=self.parts,
            learning_rate=column.rates.get(self.row, column.rates[self.rule]),
        )
        settings = dataclasses.replace(settings, **changes)
        per_epoch = max(1, num_examples // settings.batch_size)
        if "steps" not in changes:
            settings = dataclasses.replace(settings, steps=epochs * per_epoch)
        return column.warmed_up(settings)


def _read(word: str, text: str) -> tuple[str, Any]:
    """What a word after a rule sets, and to what."""
    known = [name for name in choices.TANGENTS if name not in ("guided", "sparse")]
    if word.isdecimal() and int(word):
        return "num_tangents", int(word)
    if word == "one-slope":
        return "parts", False
    if word in known:
        return "tangents", word
    raise UsageError(
        f"{text!r}: expected a number of noises, one-slope or one of {', '.join(known)}."
    )


def _signs(num_tangents: int) -> str:
    """The signs that a row draws by default."""
    return "hadamard" if num_tangents > 1 else "rademacher"
