"""A Sphinx extension that links names in prose: `fx.Exact()` leads to `forwax.Exact`.

`jax.grad(loss)` leads to JAX's own page, where docs/inventories has the name.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

NAME = re.compile(r"(fx|forwax|jax|jnp)\.([A-Za-z_.]+)(?:\(.*)?", re.DOTALL)
MODULES = {"fx": "forwax", "jnp": "jax.numpy"}


class LinkedNames(SphinxTransform):
    """Makes a reference of each literal that begins with a public name, but in headings."""

    default_priority = 400

    def apply(self, **options: object) -> None:
        """Change the document in place."""
        for literal in list(self.document.findall(nodes.literal)):
            found = NAME.fullmatch(literal.astext())
            parents = (nodes.reference, nodes.title, addnodes.pending_xref)
            if found is None or isinstance(literal.parent, parents):
                continue
            reference = addnodes.pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=f"{MODULES.get(found[1], found[1])}.{found[2]}",
                refexplicit=True,
                refwarn=False,
            )
            reference["refdoc"] = self.env.docname
            literal.replace_self(reference)


def setup(app: Sphinx) -> dict:
    app.add_transform(LinkedNames)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
