"""A Sphinx extension that warns of a picture without a text for those who cannot see it."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

SHORTEST = 20
"""A sentence has more letters."""

logger = logging.getLogger(__name__)


def check(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Look at every picture of a page, drawn by its code or not."""
    for image in doctree.findall(nodes.image):
        if len(image.get("alt", "")) < SHORTEST:
            logger.warning("%s: no alt text for %s", page, image["uri"])


def setup(app: Sphinx) -> dict:
    """Register the extension."""
    app.connect("doctree-resolved", check)
    return {"version": "1", "parallel_read_safe": True}
