"""Sphinx settings of the documentation: ``make docs`` builds it, warnings are errors."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import uq

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))

project = "uq"
author = "the authors of uq"
copyright = "the authors of uq, Apache-2.0"
version = release = uq.__version__

extensions = [
    "docstrings",
    "measured",
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

# References. Objects of other libraries have no page here, and their inventories are not fetched:
# the documentation builds without a network.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(arviz|builtins|collections|functools|gpytorch|joblib|lightning|mapie|matplotlib|numpy"
        r"|numpyro|pandas|properscoring|pathlib|pyro|scipy|scoringrules|sklearn|torch|typing|xarray)(\..*)?",
    )
]

# API reference: one page for each name, written from its docstring.
autosummary_generate = True
autodoc_typehints = "none"  # the docstrings have types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
maximum_signature_line_length = 88
add_module_names = False
smartquotes = False  # quotes in a docstring are those of strings
toc_object_entries_show_parents = "hide"

# Pages and notebooks. Notebooks keep the outputs that they were saved with.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"


def bring_tutorials() -> None:
    """Copy the notebooks below the pages, where Sphinx finds them and their links."""
    texts = {path.name: path.read_text() for path in (DOCS.parent / "tutorials").glob("*.ipynb")}
    for old in (DOCS / "tutorials").glob("*.ipynb"):
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        copy = DOCS / "tutorials" / name
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


def bring_results() -> None:
    """Copy the tables of results, whose links lead to files that have no page."""
    text = (DOCS.parent / "benchmarks" / "RESULTS.md").read_text()
    text = re.sub(r"!\[(.*?)\]\((?!http)(.*?)\)", r"![\1](../benchmarks/\2)", text)
    text = re.sub(r"(?<!!)\[(.*?)\]\((?!http|#)(.*?)\)", r"\1", text)
    copy = DOCS / "results.md"
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)


bring_tutorials()
bring_results()

# Mathematics without a network: one file of MathJax that draws glyphs as SVG.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
if _mathjax is None or _mathjax.submodule_search_locations is None:
    raise RuntimeError("sphinx-mathjax-offline is missing: pip install -e '.[docs]'")
MATHJAX = Path(_mathjax.submodule_search_locations[0]) / "static/mathjax/tex-svg-full.js"
mathjax_path = MATHJAX.name
mathjax3_config = {"svg": {"fontCache": "global"}}
math_number_all = False
math_eqref_format = "({number})"
math_numfig = False

html_theme = "pydata_sphinx_theme"
html_title = "uq"
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["uq.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_nav_level": 1,
    "navigation_depth": 2,
    "show_toc_level": 2,
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": False,
}
copybutton_exclude = ".linenos, .gp, .go"
