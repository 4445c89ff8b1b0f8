"""`forwax finetune` on a tiny model without a network: every combination, resuming, mistakes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from forwax import adapters
from forwax.lab import cli
from forwax.lab.finetune import models, run

pytestmark = pytest.mark.usefixtures("compile_once")

TINY = ["--model", "tiny-random", "--data", "tiny-sentences"]
FEW = ["--steps", "4", "--batch-size", "4", "--test-texts", "8"]
RATE = ["--learning-rate", "0.01"]
RULES = ("activity", "learned-feedback", "rank-1", "mezo", "backprop")


@pytest.fixture
def finetune(tmp_path, capsys):
    """Runs the command and gives its exit code, what it printed, and its run's folder."""

    def call(*words: str) -> tuple[int, str, Path | None]:
        code = cli.main(["finetune", "--runs", str(tmp_path / "runs"), *words])
        found = capsys.readouterr()
        folders = sorted((tmp_path / "runs").glob("finetune-*"))
        return code, found.out + found.err, folders[-1] if folders else None

    return call


def arrays(folder: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / run.ADAPTER)


OFFERED = [
    (adapter, task, rule)
    for adapter, task in (
        ("last-token", "classify"),
        ("lora", "classify"),
        ("full", "classify"),
        ("lora", "next-token"),
        ("full", "next-token"),
    )
    for rule in RULES
    if (adapter, rule) != ("full", "learned-feedback")
]


@pytest.mark.parametrize(("adapter", "task", "rule"), OFFERED)
def test_every_combination_trains(adapter, task, rule, finetune):
    words = ("--adapter", adapter, "--task", task, "--rule", rule)
    code, out, folder = finetune(*TINY, *FEW, *RATE, *words)
    assert code == 0
    names = {"config.json", "metrics.jsonl", "curves.png", "summary.json", run.ADAPTER}
    assert names | {"checkpoints"} == {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_loss"] != summary["test_loss_before"]
    assert f"Test loss {summary['test_loss_before']:.3f} before" in out
    if task == "classify":
        assert 0 <= summary["test_accuracy_shifted"] <= 1
        assert summary["test_share_of_commonest"] >= 0.5
        assert "the commonest class alone" in out
    else:
        assert summary["test_accuracy"] is None
        assert "accuracy" not in out
    assert summary["inference_bytes"] > 0
    assert summary["process_peak_bytes"] > 1e8
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sum("validation_loss" in row for row in rows) == 4
    assert sum("loss" in row for row in rows) == 4
    if adapter == "full":
        assert arrays(folder)["layers.attn_q"].shape == (2, 32, 32)
    else:
        loaded = adapters.load(folder / run.ADAPTER, config=models.tiny().config)
        assert jax.tree.leaves(loaded)
