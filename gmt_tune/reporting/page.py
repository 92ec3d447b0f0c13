"""Writes a self-contained page of figures and tables: no script, no request, light and dark, narrow and wide.

How it looks is in ``page.html``, a Jinja template.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gmt_tune._version import __version__
from gmt_tune.errors import UserError
from gmt_tune.reporting.drawing import Figure, Table, to_svg
from gmt_tune.reporting.run_log import write_whole
from gmt_tune.reporting.theme import COLORS


@dataclass(frozen=True)
class Section:
    """A part of a page; left out where it is empty."""

    heading: str
    tables: Sequence[tuple[str, Table]] = ()  # each with its caption
    figures: Sequence[Figure] = ()  # stand in a grid below the tables
    in_pairs: bool = False  # whether the figures belong together two by two


def write_page(path: Path, title: str, sections: Sequence[Section], command: str, lead: str = "") -> None:
    """Write a page whole or not at all, with ``lead`` on top and ``command`` in its last line. May raise UserError."""
    from jinja2 import Template

    template = Template(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8"), autoescape=True, keep_trailing_newline=True
    )
    page = template.render(
        title=title,
        lead=lead,
        sections=sections,
        colors=COLORS,
        to_svg=to_svg,
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        command=command,
    )
    try:
        write_whole(path, page.encode("utf-8", errors="replace"))  # a config may hold what is no text
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): name another file") from None
