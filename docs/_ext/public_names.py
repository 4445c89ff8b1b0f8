"""A Sphinx extension that fails the build (under -W) when a public name is not documented."""

import importlib
from collections.abc import Iterable
from types import ModuleType

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)

MODULES = (
    "forwax",
    "forwax.tangents",
    "forwax.combine",
    "forwax.credit",
    "forwax.privacy",
    "forwax.testing",
    "forwax.functions",
    "forwax.losses",
    "forwax.models",
    "forwax.models.ren2023",
    "forwax.lm",
    "forwax.adapters",
    "forwax.types",
)
"""Where public names are looked for."""


def public_names(modules: Iterable[str]) -> set[str]:
    """Full names, as a user writes them, of everything public in the modules, submodules aside."""
    return {
        f"{name}.{member}"
        for name in modules
        for member in _members(importlib.import_module(name))
    }


def _members(module: ModuleType) -> list[str]:
    """`__all__`, or, without one, the classes and functions that the module defines itself."""
    if hasattr(module, "__all__"):
        named = {name: getattr(module, name) for name in module.__all__}
        return [n for n, value in named.items() if not isinstance(value, ModuleType)]
    members = {
        name: value
        for name, value in vars(module).items()
        if not isinstance(value, ModuleType)
    }
    own = [
        name
        for name, value in members.items()
        if getattr(value, "__module__", None) == module.__name__
    ]
    return [name for name in own if not name.startswith("_")]


def warn_of_missing(app: Sphinx, env: BuildEnvironment) -> None:
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    for name in sorted(public_names(app.config.public_names_modules) - documented):
        logger.warning("%s is public and not documented: add it to docs/api", name)


def setup(app: Sphinx) -> dict:
    app.add_config_value("public_names_modules", list(MODULES), "env", types=[list])
    app.connect("env-check-consistency", warn_of_missing)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
