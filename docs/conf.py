"""The documentation site: `make docs` builds it into build/docs, with warnings as errors and without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import dpkernels  # noqa: E402 - found by the line above

project = "dpkernels"
author = "the dpkernels authors"
version = release = dpkernels.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "reference_pages",
    "repository_pages",
]
exclude_patterns = ["_ext"]
templates_path: list[str] = []

# Docstrings: Google's sections; `name` in single backticks is code, as everywhere in this project.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autosummary_generate = False

# Pages: Markdown that GitHub renders too.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = f"dpkernels {release}"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
