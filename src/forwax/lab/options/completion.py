"""What `forwax completion` may be asked."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


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
