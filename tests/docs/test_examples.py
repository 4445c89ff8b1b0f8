"""Every example runs with tiny settings, and the README prints what it says.

The while-loop example finds the truth.
"""

import re
from pathlib import Path

import pytest

from helpers import module_at

pytestmark = pytest.mark.promotes("Optax mixes integers and floats")
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "equinox_digits": {"epochs": 1, "batch": 512},
    "optax_loop": {"epochs": 2, "num_tangents": 4},
    "spiking": {"steps": 100, "batch": 32},
    "while_loop": {"steps": 1000, "count": 6},
}


def test_every_example_is_tested():
    assert sorted(TINY) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_the_readme(capsys):
    page = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(next(block for block in code if "print(" in block), {})
    (said,) = re.findall(r"print\(params.*  # (.*)", page)
    assert capsys.readouterr().out.replace("-0.", "0.").split() == said.split()


def test_while_loop(capsys):
    example = module_at(EXAMPLES / "while_loop.py")
    found = example.main(**TINY["while_loop"])
    assert found == pytest.approx(example.TRUTH, rel=0.02)
    by_jacfwd, by_exact = [
        line.split(":")[1].strip() for line in capsys.readouterr().out.splitlines()[1:3]
    ]
    assert by_jacfwd == by_exact


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
