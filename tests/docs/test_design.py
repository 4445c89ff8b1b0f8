"""docs/design.md names what there is: files, nouns and where they stand."""

import re
from pathlib import Path

import pytest

from helpers import module_at

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
NOUNS = re.findall(r"^\| ([^|`]+) \| [^|]+ \| `([^`]+)` \|$", PAGE, re.MULTILINE)
TO_BE_WRITTEN = "my_"
"""What a reader is told to make."""


def named_paths() -> list[str]:
    """Paths from the root that the page names."""
    paths = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.-]+)", PAGE)
    return sorted({path for path in paths if TO_BE_WRITTEN not in path})


def test_the_page_has_its_nouns():
    assert len(NOUNS) > 30


@pytest.mark.parametrize(("nouns", "place"), NOUNS, ids=[nouns for nouns, _ in NOUNS])
def test_each_noun_stands_in_its_file(nouns: str, place: str):
    text = (ROOT / "src" / "forwax" / place).read_text(encoding="utf-8")
    assert [
        noun for noun in nouns.split(", ") if not re.search(rf"\b{noun}\b", text)
    ] == []


@pytest.mark.parametrize("path", named_paths())
def test_each_path_exists(path: str):
    assert (ROOT / path).exists()


def test_the_figure_is_the_one_that_the_script_draws():
    drawn = module_at(ROOT / "docs" / "figures" / "path.py").drawing()
    assert (ROOT / "docs" / "_static" / "path.svg").read_text(encoding="utf-8") == drawn
