"""A Sphinx extension that writes formulas as MathML, which browsers draw without a script."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_convert(node, as_block=False))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(
        f'<div class="math notranslate nohighlight">{_convert(node, as_block=True)}</div>\n'
    )
    raise nodes.SkipNode


def _convert(node: nodes.Node, *, as_block: bool) -> str:
    try:
        return _adjusted(tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def _adjusted(formula: str) -> str:
    """Without the space around bars and slashes, and with accents above the letter in all fonts.

    Angles are as high as a letter, beside a sum too.
    """
    close = r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>'
    formula = re.sub(r'<mo(?: stretchy="false")?>([|/⟨⟩])</mo>', close, formula)
    return formula.replace(' accent="true"', "")


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
