"""The recipes of docs/bridges.md train, where their libraries are installed."""

import re
import tomllib
from pathlib import Path

import jax
import pytest

from helpers import needs_extra

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "bridges.md").read_text(encoding="utf-8")
CELLS = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", TEXT, flags=re.DOTALL)
RECIPES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
pytestmark = [
    pytest.mark.promotes("the libraries mix integers and floats"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("library", ["keras", "torchax"])
def test_a_recipe_trains(library, capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    needs_extra("bridges", library)
    (recipe,) = [text for text in RECIPES if f"import {library}\n" in text]
    scope: dict = {}
    with jax.numpy_rank_promotion("allow"):
        exec(CELLS[0] + recipe, scope)
    first, *_, last = scope["losses"]
    assert 2 < first < 4
    assert last < 0.2 * first
    assert f"step 200: loss {last:.3f}" in capsys.readouterr().out
    if library == "keras":  # running means were carried, and brought back
        assert (scope["said"] == scope["y"][1400:]).mean() > 0.6


def test_the_page_names_the_versions_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = extras["project"]["optional-dependencies"]["bridges"]
    torch, torchax = (
        next(pin for pin in pinned if pin.startswith(f"{name}==")).partition("==")[2]
        for name in ("torch", "torchax")
    )
    assert f"| {torch} | {torchax} | works" in TEXT


def test_every_recipe_is_tested():
    assert len(RECIPES) == 2
