"""The command `forwax`: finds the subcommand and imports it alone; the others cost nothing."""

import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from forwax import __version__
from forwax.lab.commands import COMMANDS
from forwax.lab.distributed.watch import supervised


def usage() -> str:
    """Give the help of the command itself.

    >>> print(usage().splitlines()[0])
    usage: forwax COMMAND [OPTIONS]
    """
    commands = "\n".join(f"  {name:<11}{about}" for name, about in COMMANDS.items())
    return (
        "usage: forwax COMMAND [OPTIONS]\n\nTrain and optimise without backpropagation.\n\n"
        f"{commands}\n\nHelp on a command: forwax COMMAND --help. Without options, `forwax train` "
        "trains on digits."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `forwax`; the process's own by default.

    Returns:
        The exit code: the subcommand's, 2 for a mistake in what was asked for, 4 where a file could
        not be written or another process is gone, 130 after Ctrl-C.

    Example:
        ```sh
        forwax --help
        forwax train
        ```
    """
    from forwax.lab.keeping.console import patient_streams

    with patient_streams():
        try:
            return _run(*(list(sys.argv[1:] if argv is None else argv) or ["--help"]))
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            return 130


def script() -> None:
    """Run the command line as a process of its own; after Ctrl-C it ends at once."""
    from forwax.lab.keeping.console import as_process

    as_process(main)


def _run(first: str, *words: str) -> int:
    if first in ("-h", "--help"):
        print(usage())
    elif first == "--version":
        print(f"forwax {__version__}")
    elif first in COMMANDS:
        return supervised([first, *words], lambda: _command(first, words))
    else:
        close = get_close_matches(first, COMMANDS, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        return _mistake(
            f"there is no command {first!r}; choose one of: {', '.join(COMMANDS)}.{meant}"
        )
    return 0


def _command(name: str, words: Sequence[str]) -> int:
    try:
        # help and refusals come without jax, which takes seconds
        from forwax.lab.options import options_of
        from forwax.lab.terminal import Shown, parsed

        options = parsed(*options_of(name), name, words)

        from forwax.lab.flags import DataError, UsageError
        from forwax.lab.keeping.disk import NOT_WRITTEN, refused

        module: Any = import_module(f"forwax.lab.commands.{name}")
    except ModuleNotFoundError as error:
        return _mistake(
            f"{error.name} is not installed; the command line needs: pip install 'forwax[lab]'."
        )
    try:
        return module.run(options)
    except Shown as shown:
        print(json.dumps(shown.config, indent=2))
        return 0
    except (UsageError, DataError) as error:
        return _mistake(str(error))
    except OSError as error:
        return _mistake(refused(error), NOT_WRITTEN)


def _mistake(sentence: str, code: int = 2) -> int:
    print(f"forwax: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    script()
