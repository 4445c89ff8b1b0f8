"""`forwax completion`: the shell knows commands, options and values."""

from forwax.lab.commands import COMMANDS
from forwax.lab.options import options_of
from forwax.lab.options.completion import CompletionOptions
from forwax.lab.terminal import completion


def run(options: CompletionOptions) -> int:
    """Print the script of a shell, and give the exit code 0."""
    print(completion(options.shell, {name: options_of(name)[0] for name in COMMANDS}))
    return 0
