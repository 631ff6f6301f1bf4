"""How Sphinx builds these pages: `make docs`."""

from importlib.metadata import version as version_of

project = "fastlstm"
copyright = "the fastlstm developers"
version = release = version_of("fastlstm")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"fastlstm {version}"
exclude_patterns = ["_build"]
default_role = "code"  # one backtick in a docstring is code

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3
