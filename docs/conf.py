"""The site of these pages and of the package's docstrings: `make docs` builds it with Sphinx."""

from sphinx.application import Sphinx

import dimaskdino

project = "dimaskdino"
copyright = "the authors of dimaskdino, Apache-2.0"  # noqa: A001 (Sphinx's name)
release = dimaskdino.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "dimaskdino"
# Links to the headings of a page.
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Pages beside their code, and where the site has them.
ELSEWHERE = {"../benchmarks/RESULTS.md": "benchmarks.md", "../datasets/README.md": "datasets.md"}


def link_inside(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to pages beside their code to the site's copy."""
    for path, name in ELSEWHERE.items():
        source[0] = source[0].replace(f"]({path}", f"]({name}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", link_inside)
