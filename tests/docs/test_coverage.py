"""Every public name is on a page of docs/api, or the docs build's own check would find it."""

import pkgutil
import re
import types
from pathlib import Path

import pytest

from helpers import module_at

DOCS = Path(__file__).parents[2] / "docs"


def extension(name: str):
    return module_at(DOCS / "_ext" / f"{name}.py")


MODULES = extension("public_names").MODULES


def documented(page: str) -> set[str]:
    """Full names of what a page documents."""
    names, module = set(), ""
    for directive, name in re.findall(
        r"^\.\. (\w+):: (\S+)$", page, flags=re.MULTILINE
    ):
        if directive in {"currentmodule", "automodule"}:
            module = name
        else:
            names.add(f"{module}.{name}")
    return names


def test_every_public_name_is_documented_and_no_other():
    public = extension("public_names").public_names(MODULES)
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.md")]
    assert documented("\n".join(pages)) == public


PUBLIC = [
    "forwax.grad",
    "forwax.combine.Mean",
    "forwax.functions.beale",
    "forwax.testing.Unbiased",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_seen(name: str):
    assert name in extension("public_names").public_names(MODULES)


def test_modules_and_private_names_are_not_public():
    names = extension("public_names").public_names(MODULES)
    assert (
        not {
            "forwax.combine",
            "forwax.tangents",
            "forwax.combine._divided",
            "forwax.combine.jnp",
        }
        & names
    )


@pytest.mark.parametrize("inventory", sorted(DOCS.glob("inventories/*.txt")))
def test_names_of_other_projects_exist(inventory: Path):
    lines = inventory.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Sphinx inventory version 1"
    for name, _, _ in map(str.split, lines[3:]):
        pkgutil.resolve_name(name if "." in name else f"builtins:{name}")


class Domain:
    """As much of Sphinx's environment as the check asks for: all combinations but one."""

    def get_domain(self, name: str) -> "Domain":
        assert name == "py"
        return self

    def get_objects(self) -> list[tuple]:
        names = ["Combine", "Mean", "Projection", "Shrinkage"]
        return [
            (f"forwax.combine.{name}", name, "class", "api", "", 1) for name in names
        ]


def test_the_build_warns_of_a_missing_name(monkeypatch):
    module = extension("public_names")
    warned = []
    monkeypatch.setattr(
        module.logger, "warning", lambda text, *args: warned.append(text % args)
    )
    config = types.SimpleNamespace(public_names_modules=["forwax.combine"])
    module.warn_of_missing(types.SimpleNamespace(config=config), Domain())
    assert warned == [
        "forwax.combine.ControlVariate is public and not documented: add it to docs/api"
    ]


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        (
            "The error |g - h|² of [k, *shape].",
            r"The error \|g - h\|² of [k, \*shape].",
        ),
        ("Pass `*args` to |f|.", r"Pass `*args` to \|f\|."),
        (">>> x**2", ">>> x**2"),
        ("0.", r"0\."),
    ],
)
def test_docstrings_are_plain_prose(line: str, plain: str):
    assert list(extension("plain_docstrings").escaped([line])) == [plain]


def test_doctests_end_at_an_empty_line():
    lines = [">>> x", "a|b", "", "a|b"]
    assert list(extension("plain_docstrings").escaped(lines)) == [
        ">>> x",
        "a|b",
        "",
        r"a\|b",
    ]
