"""The site of these pages and of the package's docstrings: `make docs` builds it with Sphinx."""

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import dimaskdino

project = "dimaskdino"
copyright = "the authors of dimaskdino, Apache-2.0"  # noqa: A001 (Sphinx's name)
release = dimaskdino.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "dimaskdino"
html_static_path = ["static"]
html_css_files = ["site.css"]
# Links to the headings of a page.
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Attributes that have comments of their own in the class are listed once.
napoleon_use_ivar = True
# Pages beside their code, and where the site has them.
ELSEWHERE = {"../benchmarks/RESULTS.md": "benchmarks.md", "../datasets/README.md": "datasets.md"}


def link_inside(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to pages beside their code to the site's copy."""
    for path, name in ELSEWHERE.items():
        source[0] = source[0].replace(f"]({path}", f"]({name}")


def link_by_last_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: Element) -> Element | None:
    """The target of a docstring's reference to a name that its module imports."""
    if node["refdomain"] != "py":
        return None
    found = env.domains["py"].find_obj(env, "", "", node["reftarget"], node["reftype"], 1)
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, shown, name)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", link_inside)
    app.connect("missing-reference", link_by_last_name)
