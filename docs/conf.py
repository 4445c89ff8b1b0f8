"""Sphinx settings: MyST-NB pages that run as they are built, the furo theme, no network.

Build with `sphinx-build -W --keep-going -b html docs docs/_build`.
"""

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from urllib.parse import urlsplit

from sphinx.application import Sphinx

here = Path(__file__).parent
sys.path.insert(0, str(here / "_ext"))

# The notebooks run in kernels of their own: keep them on the CPU, and free of the settings of
# whoever builds the docs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)

project = "forwax"
author = "the forwax authors"
project_copyright = "the forwax authors"
version = release = installed_version("forwax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "alt_texts",
    "gallery",
    "linked_names",
    "mathml",
    "plain_docstrings",
    "public_names",
]
exclude_patterns = ["_build", "jupyter_execute"]
if not any(
    here.glob("results/*.md")
):  # before there are results there is no page of them
    exclude_patterns.append("results.md")
    suppress_warnings = ["toc.not_readable"]

# Markdown and notebooks
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "warn"  # a warning that a cell prints is a warning of the build

# Docstrings
default_role = "code"
autodoc_member_order = "bysource"
autosummary_generate = False  # tables alone: the pages have every name
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80

# Other projects' names, by lists of what these pages mention, so that a build needs no network. A
# line of docs/inventories is `name kind page`, in the form of the first inventories of Sphinx.
intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest/", "inventories/jax.txt"),
    "python": ("https://docs.python.org/3/", "inventories/python.txt"),
}

# Pages
html_theme = "furo"
html_title = f"forwax {release}"
html_baseurl = os.environ.get("FORWAX_DOCS_URL", "")
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["forwax.css"]
html_theme_options = {
    "light_css_variables": {"picture-filter": "none", "picture-blend": "normal"},
    "dark_css_variables": {
        "picture-filter": "invert(1) hue-rotate(180deg)",
        "picture-blend": "screen",
    },
}
myst_html_meta = {
    "description": "forwax trains and optimises JAX programs without backpropagation: "
    "forward gradients as a drop-in for jax.value_and_grad.",
    "keywords": "JAX, forward gradient, forward mode, optimisation without backpropagation",
}
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "native"


def with_a_base(
    app: Sphinx, page: str, template: str, context: dict, _: object
) -> None:
    """A server shows 404.html at any address: its links count from the root of the site."""
    if page == "404":
        root = f"{urlsplit(html_baseurl).path.rstrip('/')}/"
        context["metatags"] = f'<base href="{root}">{context["metatags"]}'


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", with_a_base)
