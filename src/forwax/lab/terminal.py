"""Words on a terminal: a command's options, completion, mistyped words, numbers of things."""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from forwax.lab.flags import flag

USUAL: Mapping[str, str] = {
    "--lr": "--learning-rate",
    "--rate": "--learning-rate",
    "--bs": "--batch-size",
    "--batch": "--batch-size",
    "--epoch": "--epochs",
    "--optim": "--optimizer",
    "--dataset": "--data",
    "--output": "--out",
}
"""Options as other programs call them, and ours."""


_FLAGS = (tyro.conf.DisallowNone,)


class Shown(Exception):  # noqa: N818 (no error: the command did what was asked)
    """What a command would keep in config.json, to be printed in place of a run."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.config = config


def parsed(kind: Any, about: str | None, command: str, words: Sequence[str]) -> Any:
    """The options that a command's words say; leaves as argparse does where they say none.

    Args:
        kind: the class of the command's options.
        about: what the help says first; by default the docstring of the class.
        command: the command's name.
        words: behind it.
    """
    try:
        return tyro.cli(
            kind,
            prog=f"forwax {command}",
            description=about,
            args=words,
            config=_FLAGS,
        )
    except SystemExit as end:
        if end.code and (sentences := _meant_options(words, kind)):
            print(sentences, file=sys.stderr)
        raise


def completion(shell: str, commands: Mapping[str, Any]) -> str:
    """The script that completes commands, options and values.

    Args:
        shell: "bash", "zsh" or "tcsh".
        commands: the class of each command's options, by name.

    >>> from forwax.lab.commands.data import DataOptions
    >>> both = {name: DataOptions for name in ("this", "that")}
    >>> completion("bash", both).count("'--data-dir'")
    2
    """
    one_of: Any = Union[  # noqa: UP007 (of a tuple)
        tuple(
            Annotated[options, tyro.conf.subcommand(name)]
            for name, options in commands.items()
        )
    ]
    written = StringIO()
    with redirect_stdout(written), suppress(SystemExit):
        tyro.cli(
            one_of,
            prog="forwax",
            args=["--tyro-print-completion", shell],
            config=_FLAGS,
        )
    return written.getvalue()


def left_open(kind: Any, about: str | None = None) -> Any:
    """The type of an option that may be left out, and its help.

    tyro by itself would list its choices as a set, with None in it.
    """
    listed = tuple(sorted(_choices(kind)))
    wanted: Any = Literal[listed] if listed else None
    return Annotated[
        kind | None,
        tyro.conf.arg(constructor=wanted, help=about, help_behavior_hint=""),
    ]


def counted(number: int, noun: str) -> str:
    """A number of things in words.

    >>> counted(1, "tangent"), counted(2000, "tangent")
    ('1 tangent', '2,000 tangents')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def meant(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about a word that is none of the names: what it was meant for.

    >>> meant("trian", ["train", "compare"])
    ' Did you mean train?'
    >>> meant("x", ["train"])
    ''
    """
    close = difflib.get_close_matches(word, list(names), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _meant_options(words: Sequence[str], options: Any) -> str:
    """What words of a refused command line were meant for, a sentence each.

    Args:
        words: behind the command.
        options: the class of its options.

    >>> from forwax.lab.commands.train import TrainOptions
    >>> _meant_options(["--lr", "0.1"], TrainOptions)
    'Did you mean --learning-rate, not --lr?'
    """
    hints = get_type_hints(options, include_extras=True)
    names = {flag(name): name for name in hints}
    # what has no option in front of it is for the first field of the class's own
    first = next(iter(options.__annotations__))
    pairs = [(flag(first), word) for word in words[:1]]
    for word, behind in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        pairs.append((name, value or behind))
    found: list[str] = []
    for name, value in pairs:
        if name in names:
            choices = list(_choices(hints[names[name]]))
            if value not in choices and (end := meant(value, choices)):
                found.append(f"{end[1:-1]}, not {value}?")
        elif (usual := USUAL.get(name)) in names:
            found.append(f"Did you mean {usual}, not {name}?")
    return " ".join(found)


def _choices(kind: Any) -> Iterable[str]:
    """The names that an option's type lists."""
    for part in get_args(kind):
        if get_origin(kind) is Literal:
            yield str(part)
        else:
            yield from _choices(part)
