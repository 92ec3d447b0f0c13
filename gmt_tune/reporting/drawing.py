"""Figures: what they show and say, and how one becomes SVG for a page or a PNG file.

Drawn with matplotlib: its SVG goes into a page as it is, without a script or a font, takes the page's colours,
and the same figure makes the PNG. Interactive libraries would put megabytes of JavaScript into every page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gmt_tune.errors import UserError
from gmt_tune.reporting.theme import LIGHT, with_css_variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# In CSS pixels: as wide as a phone's column, so that text is as large there as on a desktop.
WIDTH = 360
_PNG_PIXELS = 2.5  # per CSS pixel


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure, for those who cannot see it and those who want them exact."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure, not drawn yet."""

    key: str  # short name, for its file and its place in the page
    title: str  # what it shows
    note: str  # units, and how to read it; one or two sentences
    alt: str  # what one sees in it, in words and numbers
    draw: Callable[[Canvas], None]  # draws it on an empty matplotlib figure
    height: int = 230  # in CSS pixels
    table: Table | None = None  # its numbers, where they are few


def require_matplotlib() -> None:
    """Raise UserError, which says what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element to put into a page: with title and description, without fixed size."""
    buffer = io.StringIO()
    _render(figure, buffer, "svg")
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Ids must be unique in a page, and every figure numbers its own from 1.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{figure.key}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#([^")]+)', rf"\1#{figure.key}-\2", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    viewbox = next(re.finditer(r'viewBox="[^"]+"', svg))[0]
    names = f"{figure.key}-title {figure.key}-desc"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {viewbox} role="img" '
        f'aria-labelledby="{names}"><title id="{figure.key}-title">{escape(figure.title)}</title>'
        f'<desc id="{figure.key}-desc">{escape(figure.alt)}</desc>'
    )
    return head + with_css_variables(svg[svg.index(">") + 1 :].strip())


def to_png(figure: Figure, folder: Path) -> Path:
    """Write the figure, with its title, as ``<key>.png`` into a folder, which is made if need be."""
    path = folder / f"{figure.key}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _render(figure, path, "png")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): name another folder") from None
    return path


def _render(figure: Figure, target, kind: str) -> None:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    colors = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), LIGHT["muted"])
    colors |= {"grid.color": LIGHT["grid"], "text.color": LIGHT["ink"]}
    with matplotlib.rc_context(colors, fname=Path(__file__).with_name("figures.mplstyle")):
        height = figure.height + (26 if kind == "png" else 0)
        canvas = Canvas(figsize=(WIDTH / 72, height / 72), layout="constrained", facecolor=LIGHT["card"])
        figure.draw(canvas)
        if kind == "png":
            canvas.suptitle(figure.title, x=0.02, ha="left", fontsize=11.5, fontweight="bold")
            canvas.savefig(target, format="png", dpi=72 * _PNG_PIXELS)
        else:
            canvas.savefig(target, format="svg", transparent=True, metadata={"Date": None})
