"""The command `forwax`: finds the subcommand and imports it alone; the others cost nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "train": (
        "forwax.lab.commands.train",
        "TrainOptions",
        "train a model on real data, by default without backpropagation",
    ),
    "compare": (
        "forwax.lab.commands.compare",
        "CompareOptions",
        "train the same model by several rules, side by side",
    ),
    "diagnose": (
        "forwax.lab.commands.diagnose",
        "DiagnoseOptions",
        "measure what rules give and cost, and say which to use",
    ),
    "optimize": (
        "forwax.lab.commands.optimize",
        "OptimizeOptions",
        "minimise a test function by backprop and without it",
    ),
    "reproduce": (
        "forwax.lab.commands.reproduce",
        "ReproduceOptions",
        "run a paper's experiments, ours beside the paper's",
    ),
    "data": (
        "forwax.lab.commands.data",
        "DataOptions",
        "fetch, verify and cache a data set, or say where it is",
    ),
}
"""Each subcommand: its module, its options there, and one line about it."""


def usage() -> str:
    """Give the help of the command itself.

    >>> print(usage().splitlines()[0])
    usage: forwax COMMAND [OPTIONS]
    """
    lines = [f"  {name:<11}{about}" for name, (_, _, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: forwax COMMAND [OPTIONS]",
            "",
            "Train and optimise without backpropagation.",
            "",
            *lines,
            "",
            "Help on a command: forwax COMMAND --help. Without options, `forwax train` trains on "
            "digits.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `forwax`; the process's own by default.

    Returns:
        The exit code: the subcommand's, 2 for a mistake in what was asked for, 130 after Ctrl-C.

    Example:
        ```sh
        forwax --help
        forwax train
        ```
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from importlib import metadata

        print(f"forwax {metadata.version('forwax')}")
        return 0
    if words[0] not in COMMANDS:
        return _mistake(f"there is no command {words[0]!r}; choose one of: {', '.join(COMMANDS)}.")
    return _run(words[0], words[1:])


def _run(name: str, words: list[str]) -> int:
    # tyro first, since a missing extra is the likeliest reason for a failing import
    try:
        import tyro

        from forwax.lab.data import DataError
        from forwax.lab.flags import UsageError

        module_name, options_name, _ = COMMANDS[name]
        module: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        return _mistake(
            f"{error.name} is not installed; the command line needs: pip install 'forwax[lab]'."
        )
    # without a text of its own, a command is described by its options' docstring
    description = getattr(module, "DESCRIPTION", None)
    options = tyro.cli(
        getattr(module, options_name),
        prog=f"forwax {name}",
        description=description,
        args=words,
        config=(tyro.conf.DisallowNone,),
    )
    try:
        return module.run(options)
    except (UsageError, DataError) as error:
        return _mistake(str(error))
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _mistake(sentence: str) -> int:
    print(f"forwax: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
