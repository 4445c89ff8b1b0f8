"""Two steps of every experiment, from the command line to the summary, on tiny files."""

import json

import pytest

from forwax.lab import cli
from forwax.lab.catalogue.experiments import EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_steps_of_every_experiment(name, tiny_data, tmp_path):
    words = [
        "train",
        name,
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--num-tangents",
        "1",
        "--runs",
        str(tmp_path),
    ]
    assert cli.main(words) == 0
    (summary,) = tmp_path.glob("*/summary.json")
    told = json.loads(summary.read_text())
    assert told["steps"] == 2
    assert 0 <= told["test_accuracy"] <= 1
    assert not told["reverse_mode"]
