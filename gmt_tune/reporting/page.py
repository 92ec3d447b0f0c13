"""A self-contained HTML page of figures and tables: no script, no request, light and dark, narrow and wide."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gmt_tune.errors import UserError
from gmt_tune.reporting.drawing import Figure, Table, to_svg
from gmt_tune.reporting.theme import css_variables

_CSS = """
:root{--font:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 var(--font);-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:20px 16px 40px}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:26px 0 10px}
p{margin:0 0 10px;max-width:75ch}
.lead,footer,figcaption .note{color:var(--muted)}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px}
h3{font-size:1rem;margin:0 0 4px}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:14px}
@media (min-width:760px){.figures.pairs{grid-template-columns:1fr 1fr;align-items:start}}
.tables{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px;align-items:start}
figure{margin:0;min-width:0}
figcaption{font-weight:600;line-height:1.35;margin-bottom:6px;overflow-wrap:anywhere}
figcaption .note{display:block;font-weight:400;font-size:.84rem}
figure svg{display:block;width:100%;height:auto;max-width:460px;margin:0 auto}
details{margin-top:8px;font-size:.84rem}
summary{cursor:pointer;color:var(--muted)}
.scroll{overflow-x:auto}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--series-0);outline-offset:2px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
.tables table{width:100%}
details table{font-size:.8rem}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
tr:last-child>*{border-bottom:0}
th{font-weight:600}
tbody th{font-weight:400;color:var(--muted)}
td{overflow-wrap:anywhere;min-width:7.4em}
tbody th{min-width:6em;overflow-wrap:break-word}
details td,details tbody th{min-width:0}
table.numbers td,table.numbers thead th:not(:first-child){text-align:right;padding:4px 0 4px 14px;white-space:nowrap}
footer{margin-top:26px;font-size:.84rem}
@media print{body{background:none}.card{break-inside:avoid}}
"""


def build_page(
    title: str,
    sections: Sequence[tuple[str, Sequence[Figure | tuple[str, Table]]]],
    footer: str,
    *,
    lead: str = "",
    in_pairs: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        title: heading, also of the browser's tab.
        sections: heading and content. Figures stand in a grid; a table comes with its caption.
        footer: what made the page.
        lead: a sentence or two below the heading.
        in_pairs: headings of sections whose figures belong together two by two.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if lead:
        body.append(f'<p class="lead">{escape(lead)}</p>')
    for heading, content in sections:
        if not content:
            continue
        body.append(f"<section><h2>{escape(heading)}</h2>")
        figures = [item for item in content if isinstance(item, Figure)]
        tables = [item for item in content if not isinstance(item, Figure)]
        if tables:
            body.append('<div class="tables">' + "".join(_table(*item) for item in tables) + "</div>")
        if figures:
            pairs = " pairs" if heading in in_pairs else ""
            body.append(f'<div class="figures{pairs}">' + "".join(map(_figure, figures)) + "</div>")
        body.append("</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # The page says itself that it fetches nothing: the browser holds it to that.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{css_variables()}{_CSS}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all.

    Raises:
        UserError: if it cannot be written there.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8", errors="replace")  # a config may hold what is no text
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): name another file") from None
    finally:
        with contextlib.suppress(OSError):  # also where the folder is none
            part.unlink(missing_ok=True)


def _figure(figure: Figure) -> str:
    table = ""
    if figure.table is not None:
        scrolling = _scrolling(figure.table, figure.title, numbers=True)
        table = f"<details><summary>Numbers</summary>{scrolling}</details>"
    return (
        f'<figure class="card" id="{figure.key}"><figcaption>{escape(figure.title)}'
        f'<span class="note">{escape(figure.note)}</span></figcaption>{to_svg(figure)}{table}</figure>'
    )


def _table(caption: str, table: Table) -> str:
    return f'<div class="card"><h3>{escape(caption)}</h3>{_scrolling(table, caption)}</div>'


def _scrolling(table: Table, label: str, numbers: bool = False) -> str:
    """A table that scrolls sideways by itself where it is wider than the screen, also by keyboard."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    kind = ' class="numbers"' if numbers else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table{kind}>{head}<tbody>{rows}</tbody></table></div>"
    )
