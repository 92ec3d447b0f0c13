"""The documentation's site, for Sphinx: `sphinx-build -W docs site` builds it, and fails where a link does not lead
anywhere. Pages are Markdown (MyST), so that they read well in a checkout too; the API reference is read from the
docstrings, for which gmt_tune is imported. It needs no network."""

import subprocess
from importlib import metadata
from pathlib import Path

# `import gmt_tune` sets up the versions of torchtune that others know through PyTorch's autoload
import torch  # noqa: F401

import gmt_tune

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit of the checkout that the site is made of, "" where there is none."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


project = "gmt-tune"
author = "The gmt-tune developers"
release = gmt_tune.__version__
# What Furo shows at the foot of every page
_made_with = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchtune", "torchao", "transformers"))
_made_from = f" (commit {found})" if (found := commit()) else ""
copyright = f"{author}. gmt-tune {release}{_made_from}; made with {_made_with}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # links such as page.md#a-heading are checked
nitpicky = True
# Types of other packages, which only their own documentation has
nitpick_ignore_regex = [
    ("py:(class|obj)", r"(?!gmt_tune\.).*"),
    # Internal, in signatures of what is public
    ("py:class", r"gmt_tune\.(masking\.(places|search)|deltas\.file_format|reporting\.safetensors_file)\..*"),
]
exclude_patterns = []

autodoc_mock_imports = ["axolotl"]  # needs an environment of its own
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "gmt-tune"
html_show_sphinx = False
html_last_updated_fmt = "%Y-%m-%d"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
