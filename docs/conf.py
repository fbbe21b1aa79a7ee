"""Settings of the documentation site (``make docs``), built from the whole repository so that links work."""

from megatron_fope import __version__

project = "megatron-fope"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/contents"
include_patterns = ["*.md", "docs/*", "examples/*.md", "examples/**/*.md", "patches/*.md", "tests/*.md"]
suppress_warnings = ["toc.no_title"]  # tables of results are included in pages and have none
html_theme = "furo"
html_title = f"megatron-fope {version}"

myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
