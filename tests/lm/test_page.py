"""The code of docs/language-model.md runs, on a tiny model in place of the real one."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

for package in ("gguf", "tokenizers", "safetensors"):
    pytest.importorskip(package)

PAGE = Path(__file__).parents[2] / "docs" / "language-model.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


def test_the_page_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"path": tiny("Q4_1").write(tmp_path / "tiny.gguf")}
    for block in BLOCKS:
        exec(block, scope)
    assert jnp.isfinite(scope["value"])
    loaded = scope["adapter"]
    assert jax.tree.leaves(loaded)[0].shape == (3, 64, 4)
    assert (tmp_path / "adapter.safetensors").is_file()
