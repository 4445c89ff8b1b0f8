"""What each command may be asked, a module each: read without jax, so that help comes at once."""

from importlib import import_module
from typing import Any


def options_of(command: str) -> tuple[Any, str | None]:
    """Give the class of a command's options, and what its help says first, if not its docstring.

    >>> options_of("data")[0].__name__
    'DataOptions'
    """
    module = import_module(f"{__name__}.{command}")
    kind = getattr(module, f"{command.title()}Options")
    return kind, getattr(module, "DESCRIPTION", None)
