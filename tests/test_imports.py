"""Importing forwax costs jax and numpy only, and imports run one way."""

import ast
import collections
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "src" / "forwax"
CORE = [
    path
    for path in SOURCE.rglob("*.py")
    if not {"lab", "models"} & set(path.relative_to(SOURCE).parts)
]


def test_importing_forwax_imports_nothing_beyond_jax():
    script = (
        "import sys, json, jax, jax.numpy, jax.scipy.linalg; before = set(sys.modules); import "
        "forwax; forwax.grad; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    extra = (
        set(json.loads(out.stdout))
        - {"forwax", "jax", "jaxlib", "numpy"}
        - set(sys.stdlib_module_names)
    )
    assert extra == set()


def test_import_rules_hold():
    command = shutil.which(
        "lint-imports", path=str(pathlib.Path(sys.executable).parent)
    ) or shutil.which("lint-imports")
    assert command is not None, (
        "import-linter is missing; pip install -e '.[lab,dev]' brings it"
    )
    out = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_jax(path):
    assert "jax._src" not in path.read_text()


READERS_OF_JAXPRS = (
    "jax.extend.core",
    "make_jaxpr",
    "jaxprs_in_params",
    "jax.core",
    "eqns",
)


@pytest.mark.parametrize(
    "path",
    [path for path in CORE if "_programs" not in path.parts],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_only_programs_reads_jaxprs(path):
    assert not [word for word in READERS_OF_JAXPRS if word in path.read_text()]


PUBLIC = {
    "adapters",
    "combine",
    "credit",
    "functions",
    "lab",
    "lm",
    "losses",
    "models",
    "privacy",
    "tangents",
    "testing",
    "types",
}


def test_what_is_private_has_an_underscore():
    inside = {path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py")}
    assert {name for name in inside if not name.startswith("_")} == PUBLIC


def test_no_class_is_declared_twice():
    names = [
        node.name.lstrip("_")
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [
        name for name, count in collections.Counter(names).items() if count > 1
    ] == []


def test_explain_is_the_function_alone():
    import forwax as fx

    assert callable(fx.explain)
    assert "forwax.explain" not in sys.modules


def test_the_front_page_is_short():
    import forwax as fx

    text = (SOURCE / "_public.py").read_text()
    # A public name takes an import and an entry of `__all__`, and there is no logic.
    assert len(text.splitlines()) < 2 * len(fx.__all__) + 12
    assert {type(node) for node in ast.parse(text).body} <= {
        ast.Expr,
        ast.ImportFrom,
        ast.Assign,
    }


LAZY = """
import sys
from forwax.lab import cli

assert cli.main(sys.argv[1:]) == 0
early = {"jax", "numpy", "tyro"} & set(sys.modules)
assert not early, early

import forwax as fx
from forwax import *

assert LearnedFeedback is fx.LearnedFeedback
assert "update" in dir(fx)
assert fx.combine.Mean
try:
    fx.nothing
except AttributeError as error:
    assert "'forwax' has no attribute 'nothing'" in str(error)
"""


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_the_version_and_the_help_import_neither_jax_nor_numpy(word):
    command = [sys.executable, "-c", LAZY, word]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "forwax" in done.stdout


def test_every_public_name_exists_and_has_a_docstring():
    import forwax as fx

    for module in (fx, fx.tangents, fx.combine, fx.testing):
        for name in getattr(module, "__all__", []):
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"
