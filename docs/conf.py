"""The documentation's site, for Sphinx: `sphinx-build -W docs site` builds it, and fails where a link does not lead
anywhere. Pages are Markdown (MyST), so that they read well in a checkout too. It needs no network."""

import re
from pathlib import Path

project = "gmt-tune"
author = "The gmt-tune authors"
copyright = author
_VERSION_FILE = Path(__file__).parents[1] / "gmt_tune" / "_version.py"
release = re.search(r'__version__ = "(.+)"', _VERSION_FILE.read_text()).group(1)

extensions = ["myst_parser"]
myst_heading_anchors = 4  # links such as page.md#a-heading are checked
nitpicky = True
exclude_patterns = []

html_theme = "furo"
html_title = "gmt-tune"
html_show_sphinx = False
