"""Every example runs with tiny settings, and the README prints what it says.

The fits find the truth.
"""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import assert_trees_close
from helpers import module_at

pytestmark = pytest.mark.promotes("Optax mixes integers and floats")
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "contact_policy": {"steps": 3, "count": 4, "num_steps": 12, "rounds": 1},
    "equinox_digits": {"epochs": 1, "batch": 512},
    "mjx_arm": {"num_steps": 24, "steps": 3},
    "optax_loop": {"epochs": 2, "num_tangents": 4},
    "spiking": {"steps": 100, "batch": 32},
    "tomography": {"side": 12, "seconds": 3.0},
    "while_loop": {"steps": 1000, "count": 6},
}


def test_every_example_is_tested():
    assert sorted(TINY) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


ROOT = EXAMPLES.parent
PASTED = [ROOT / "README.md", ROOT / "docs" / "index.md"]


@pytest.mark.parametrize("path", PASTED, ids=[path.name for path in PASTED])
def test_pages_that_run_as_they_are_pasted(path, capsys):
    """All blocks of a page in turn; what a line prints is what stands behind it."""
    page = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    promised = re.findall(r"^print\(.*\)  # (\[.*)$", page, flags=re.MULTILINE)
    assert blocks
    assert promised
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out.replace("-0.", "0.").split()
    for line in promised:
        assert " ".join(line.split()) in " ".join(printed)


def test_while_loop(capsys):
    pytest.importorskip("optimistix")
    example = module_at(EXAMPLES / "while_loop.py")
    found = example.main(**TINY["while_loop"])
    said = capsys.readouterr().out
    by_jacfwd, by_exact = [
        line.split(":")[1].strip() for line in said.splitlines()[1:3]
    ]
    assert by_jacfwd == by_exact
    fits = list(found.values())
    for fit, accuracy in zip(fits, (1e-4, 1e-4, 0.02), strict=False):
        world = jax.tree.map(float, example.to_world(fit.parameters))
        assert world == pytest.approx(example.TRUTH, rel=accuracy)
    first, *others = fits
    assert all(fit.runs <= first.runs for fit in others[2:])
    for name in found:
        assert f"{name:28}" in said


def test_tomography(capsys, tmp_path):
    example = module_at(EXAMPLES / "tomography.py")
    path = tmp_path / "ground.png"
    found = example.main(**TINY["tomography"], picture=path)
    said = capsys.readouterr().out
    assert "jax.grad refuses: Reverse-mode differentiation does not work" in said
    first, *_ = found.values()
    assert first.reached
    assert first.steps < 30
    assert path.stat().st_size > 10_000
    for name in found:
        assert f"{name:30}" in said


def test_arrivals_are_distances_in_even_ground():
    example = module_at(EXAMPLES / "tomography.py")
    times = example.travel_times(jnp.ones((40, 40)), jnp.array([0, 0]))
    at = np.arange(40) / 40
    exact = np.hypot(at[:, None], at)
    # first order: late by a cell at most
    assert np.all(times >= exact - 1e-5)
    assert np.max(times - exact) < 1.5 / 40


def test_contact_policy(capsys, tmp_path):
    example = module_at(EXAMPLES / "contact_policy.py")
    picture = tmp_path / "paths.png"
    losses = example.main(**TINY["contact_policy"], picture=str(picture))
    said = capsys.readouterr().out
    assert said.startswith("jax.grad: Reverse-mode differentiation does not work")
    for name, found in losses.items():
        assert name in said
        assert found[0] == pytest.approx(losses["enable_reverse"][0], rel=1e-4)
    assert picture.stat().st_size > 1000


def test_contact_policy_has_the_gradient_of_the_fixed_loop():
    example = module_at(EXAMPLES / "contact_policy.py")
    games = example.draw_games(jax.random.key(1), 8)
    policy = example.initial_policy(jax.random.key(2))
    ways = example.gradients(games, 30)
    value, exact = ways["enable_reverse"](jax.random.key(0), policy)
    fixed_value, fixed = ways["40 sweeps"](jax.random.key(0), policy)
    assert float(value) == pytest.approx(float(fixed_value), rel=1e-5)
    assert_trees_close(exact, fixed, rtol=2e-3, atol=2e-4)


def test_mjx_arm(capsys, tmp_path):
    if (
        os.environ.get("FORWAX_EXTRA") != "mjx"
    ):  # with which .ci/run says that it is there
        pytest.importorskip("mujoco.mjx", reason="needs pip install 'forwax[mjx]'")
    with jax.numpy_rank_promotion("allow"):
        example = module_at(EXAMPLES / "mjx_arm.py")
        picture = tmp_path / "swing.png"
        found = example.main(**TINY["mjx_arm"], picture=picture)
    said = capsys.readouterr().out
    assert "jax.grad: Reverse-mode differentiation does not work" in said
    assert found["errors"]["central differences"] < 2e-3
    assert found["errors"]["jax.jacfwd"] < 1e-6
    assert found["ends"]["fx.GaussNewton"] < 0.1 * found["first"]
    for name in found["ends"]:
        assert name in said
    assert picture.stat().st_size > 1000


def test_spiking(capsys):
    reached = module_at(EXAMPLES / "spiking.py").main(**TINY["spiking"])
    assert 0.5 < reached <= 1
    assert f"{reached:.0%}" in capsys.readouterr().out


def test_optax_loop(capsys):
    accuracy = module_at(EXAMPLES / "optax_loop.py").main(**TINY["optax_loop"])
    assert 0.2 < accuracy <= 1
    assert f"test accuracy {accuracy:.1%}" in capsys.readouterr().out


def test_equinox_digits(capsys, monkeypatch):
    example = module_at(EXAMPLES / "equinox_digits.py")
    rules = {name: example.RULES[name] for name in ("backprop", "projection on 32")}
    monkeypatch.setattr(example, "RULES", rules)
    accuracies = example.main(**TINY["equinox_digits"])
    said = capsys.readouterr().out
    for name in rules:
        assert 0 <= accuracies[name] <= 1
        assert f"{name:16}: mean loss" in said
        assert f"test accuracy {accuracies[name]:.1%}" in said
