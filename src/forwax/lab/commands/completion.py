"""`forwax completion`: the shell knows commands, options and values."""

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

import tyro

from forwax.lab.commands import COMMANDS
from forwax.lab.terminal import completion


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script by which a shell completes commands, options and their values.

    Example:
        ```sh
        source <(forwax completion bash)
        forwax completion zsh > "${fpath[1]}/_forwax"
        forwax completion tcsh > ~/.forwax.tcsh
        ```
    """

    shell: Annotated[Literal["bash", "zsh", "tcsh"], tyro.conf.Positional]
    """The shell that reads it."""


def run(options: CompletionOptions) -> int:
    """Print the script of a shell, and give the exit code 0."""
    print(completion(options.shell, {name: _options_of(name) for name in COMMANDS}))
    return 0


def _options_of(command: str) -> Any:
    module = import_module(f"forwax.lab.commands.{command}")
    return getattr(module, f"{command.title()}Options")
