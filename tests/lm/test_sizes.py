"""The memory of steps on SmolLM2's shapes, as the compiler counts it; no weights are read."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "language_memory.py"


@pytest.fixture
def figures():
    spec = importlib.util.spec_from_file_location("language_memory", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.figures()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_steps_on_smollm2_take_what_is_told(figures):
    assert figures["rank-1, whole logits"] <= 150
    assert figures["rank-1, head in chunks"] <= 45
    assert figures["MeZO, 4 x 64"] <= 1.1 * figures["inference, 4 x 64"]
    assert figures["MeZO, 4 x 512"] <= 1.1 * figures["inference, 4 x 512"]
    assert figures["all arrays of low rank 8 on a 4-bit base, MeZO"] <= 115
    assert figures["all arrays of low rank 8 on a 4-bit base, rank-1"] <= 115
