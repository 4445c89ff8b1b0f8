"""A Sphinx extension: the directive `gallery`, which shows notebooks by their first pictures.

Each line of its content is a page. A card has the picture that the page's code drew last, the
page's title and its first paragraph. The build warns of a page without a picture, of a picture
without a text for those who cannot see it, and of a notebook that would be downloaded without
outputs.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


class card(nodes.Element):  # noqa: N801 (docutils names nodes so)
    """A place for a page of the gallery, until all pages have been read."""


class Gallery(SphinxDirective):
    """Cards for the pages that its lines name, relative to the page that it stands on."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """One element with a card for each line."""
        folder = self.env.docname.rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
        shown = nodes.container(classes=["gallery"])
        for name in self.content:
            shown += card(page=prefix + name.strip())
        return [shown]


def make_cards(app: Sphinx, document: nodes.document, name: str) -> None:
    """Put cards in their places, from pages as they were read."""
    for place in list(document.findall(card)):
        page = place["page"]
        address = app.builder.get_relative_uri(name, page)
        place.replace_self(card_of(app, page, address))


def card_of(app: Sphinx, page: str, address: str) -> nodes.container:
    """A picture and a title, both of which lead to the page, and its first paragraph."""
    read = app.env.get_doctree(page)
    pictures = [node for node in read.findall(nodes.image) if node.get("alt")]
    # A quick build of the text alone draws nothing.
    is_run = app.config.nb_execution_mode != "off"
    if is_run and not pictures:
        logger.warning("%s: no picture with an alt text for its card", page)
    if is_run and not has_outputs(
        Path(app.env.mystnb_config.output_folder, f"{page}.ipynb")
    ):
        logger.warning("%s: its notebook has no outputs", page)
    shown = nodes.container(classes=["gallery-card"])
    title = nodes.Text(app.env.titles[page].astext())
    for content in [*(node.deepcopy() for node in pictures[-1:]), title]:
        link = nodes.reference("", "", content, refuri=address, internal=True)
        shown += nodes.paragraph("", "", link)
    text = next(read.findall(nodes.paragraph)).astext()
    shown += nodes.paragraph("", text)
    return shown


def has_outputs(notebook: Path) -> bool:
    """Whether an executed notebook lies there, with anything that a cell gave."""
    if not notebook.is_file():
        return False
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return any(cell.get("outputs") for cell in cells)


def setup(app: Sphinx) -> dict:
    """Register the extension."""
    app.add_node(card)
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", make_cards)
    return {"version": "1", "parallel_read_safe": True}
