"""Every notebook of the gallery has a card and a download, and cards have pictures with texts."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in (DOCS / "gallery").glob("*.md"))
# the smallest PNG: one white pixel
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mP8/x8AAwMCAO+ip1sA"
    "AAAASUVORK5CYII="
)


def test_the_gallery_has_every_notebook_and_every_script():
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert len(PAGES) >= 8
    for directive in ("gallery", "toctree"):
        block = re.search(rf"^```{{{directive}}}\n(.*?)^```", page, re.S | re.M)[1]
        assert sorted(re.findall(r"^gallery/(.+)$", block, re.M)) == PAGES
    for script in (ROOT / "examples").glob("*.py"):
        assert f"<../examples/{script.name}>" in page


@pytest.mark.parametrize("page", PAGES)
def test_a_notebook_offers_itself(page):
    text = (DOCS / "gallery" / f"{page}.md").read_text(encoding="utf-8")
    assert f"{{nb-download}}`Download this page as a notebook <{page}.ipynb>`" in text


def notebook(title, image=True, alt="A picture in white alone", outputs=True):
    """A notebook of one cell that has run."""
    data = {"image/png": PIXEL} if image else {"text/plain": "3"}
    shown = nbformat.v4.new_output("display_data", data)
    cell = nbformat.v4.new_code_cell("draw()", outputs=[shown] if outputs else [])
    if alt:
        cell.metadata["mystnb"] = {"image": {"alt": alt}}
    text = f"# {title}\n\nWhat it is about.\n\n{{nb-download}}`this <{title}.ipynb>`"
    cells = [nbformat.v4.new_markdown_cell(text), cell]
    language = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=language)


def build(folder, notebooks):
    """Build a site of a gallery; the page, and what was warned of."""
    (folder / "more").mkdir()
    for name, made in notebooks.items():
        nbformat.write(made, folder / "more" / f"{name}.ipynb")
    names = "\n".join(f"more/{name}" for name in notebooks)
    text = f"# Index\n\n```{{gallery}}\n{names}\n```\n\n```{{toctree}}\n{names}\n```\n"
    (folder / "index.md").write_text(text)
    settings = {
        "extensions": ["myst_nb", "gallery", "alt_texts"],
        "nb_execution_excludepatterns": ["*"],
        "html_theme": "basic",
    }
    warned, out = io.StringIO(), folder / "out"
    app = Sphinx(folder, None, out, out, "html", settings, status=None, warning=warned)
    app.build()
    return (out / "index.html").read_text(encoding="utf-8"), warned.getvalue(), out


@pytest.fixture
def extensions(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))


def test_cards_and_downloads(tmp_path, extensions):
    page, warned, out = build(
        tmp_path, {"One": notebook("One"), "Two": notebook("Two")}
    )
    assert warned == ""
    for name in ("One", "Two"):
        link = f'href="more/{name}.html"'
        picture = rf'<a [^>]*{link}[^>]*><img alt="A picture in white alone"[^>]* src="([^"]+)"'
        assert (out / re.search(picture, page)[1]).read_bytes() == base64.b64decode(
            PIXEL
        )
        assert re.search(rf"<a [^>]*{link}[^>]*>{name}</a>", page)
    assert page.count("<p>What it is about.</p>") == 2
    for download in (out / "_downloads").rglob("*.ipynb"):
        cells = nbformat.read(download, as_version=4).cells
        assert any(cell.get("outputs") for cell in cells)
    assert len(list((out / "_downloads").rglob("*.ipynb"))) == 2


def test_what_is_missing_is_warned_of(tmp_path, extensions):
    _, warned, _ = build(
        tmp_path,
        {
            "No": notebook("No", image=False),
            "Blind": notebook("Blind", alt=None),
            "Empty": notebook("Empty", outputs=False),
        },
    )
    for name in ("No", "Blind", "Empty"):
        assert f"more/{name}: no picture with an alt text for its card" in warned
    assert warned.count("more/Blind: no alt text for ") == 1
    assert warned.count("no alt text") == 1
    assert "more/Empty: its notebook has no outputs" in warned
    assert warned.count("has no outputs") == 1
