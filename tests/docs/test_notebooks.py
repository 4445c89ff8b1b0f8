"""Every page with code runs from top to bottom: no error, and nothing on stderr.

The build of the docs runs all of them, and fails for the same reasons: here all but one are slow.
"""

import os
from pathlib import Path

import jupytext
import nbclient
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for folder in ("", "gallery")
    for path in DOCS.joinpath(folder).glob("*.md")
    if "{code-cell}" in path.read_text(encoding="utf-8")
)


def execute(page: str):
    """Run a page in a kernel of its own and return the notebook with its outputs."""
    notebook = jupytext.read(DOCS / page)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        # where the docs build runs it
        resources={"metadata": {"path": str((DOCS / page).parent)}},
    )
    flags = os.environ[
        "XLA_FLAGS"
    ].split()  # the tests' eight devices are not for readers
    flags = [flag for flag in flags if not flag.startswith("--xla_force_host_platform")]
    return client.execute(env={**os.environ, "XLA_FLAGS": " ".join(flags)})


def printed(notebook, name: str) -> str:
    """Everything that the cells wrote on a stream."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == name
    )


def test_the_pages_with_code_are_found():
    assert {"guide.md", "limits.md", "recipes.md", QUICK} <= set(PAGES)


QUICK = "gallery/own-rule.md"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page == QUICK else pytest.mark.slow)
        for page in PAGES
    ],
)
def test_page_runs(page: str):
    notebook = execute(page)
    assert printed(notebook, "stderr") == ""
    assert printed(notebook, "stdout") != ""
