"""The recipes of docs/fit-a-simulation.md run where their libraries are installed, and find it."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "fit-a-simulation.md"
TEXT = PAGE.read_text(encoding="utf-8")
CELLS = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", TEXT, flags=re.DOTALL)
RECIPES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
pytestmark = pytest.mark.promotes("the libraries mix integers and floats")


def run(library: str, word: str) -> dict:
    """What the recipe with a word in it leaves behind the page's first cell."""
    pytest.importorskip(library)
    (recipe,) = [recipe for recipe in RECIPES if word in recipe]
    scope: dict = {}
    with jax.numpy_rank_promotion("allow"):
        exec(CELLS[0], scope)
        exec(recipe, scope)
    return scope


@pytest.mark.parametrize(
    ("library", "word"),
    [
        ("optimistix", "LevenbergMarquardt"),
        ("scipy", "L-BFGS-B"),
        ("optimistix", "optimistix.BFGS"),
    ],
)
def test_fits_find_the_truth(library, word):
    scope = run(library, word)
    np.testing.assert_allclose(scope["found"], scope["truth"], rtol=0.01)


def test_a_sampler_stays_near_the_truth():
    scope = run("blackjax", "blackjax.nuts")
    np.testing.assert_allclose(scope["found"], scope["truth"], atol=0.5)
    assert not np.array_equal(scope["found"], scope["truth"])


def test_a_differential_equation_until_an_event():
    """The second body has 2 exp(-b t) at t = log(2)/a."""
    scope = run("diffrax", "ForwardMode")
    closed = lambda r: 2 * jnp.exp(-r[1] * jnp.log(2.0) / r[0])
    expected = jax.grad(closed)(jnp.array([0.7, 0.3]))
    np.testing.assert_allclose(scope["slope"], expected, rtol=1e-2)


def test_every_recipe_is_tested():
    assert len(RECIPES) == 5
