"""Colours of pages and figures, for light and dark screens.

Figures are drawn once, with the light colours; in a page, each of these becomes a CSS variable that a dark screen
gives another value.
"""

from __future__ import annotations

import re

LIGHT = {
    "ink": "#1f2430",
    "muted": "#646b7c",
    "grid": "#e3e5ea",
    "card": "#fffffe",
    "page": "#f4f5f7",
    "series-0": "#2563ab",
    "series-1": "#c8530f",
    "series-2": "#17803e",
    "series-3": "#8e3fc0",
    "series-4": "#b4235a",
    "series-5": "#0d7685",
    "series-6": "#8a6a08",
    "series-7": "#5b6474",
}
DARK = {
    "ink": "#e7e9ef",
    "muted": "#a0a7b6",
    "grid": "#343a48",
    "card": "#1b1f29",
    "page": "#12151c",
    "series-0": "#6fa8ea",
    "series-1": "#f0914f",
    "series-2": "#5cc47f",
    "series-3": "#c591ea",
    "series-4": "#ee7ba4",
    "series-5": "#4fc0d0",
    "series-6": "#d9b64a",
    "series-7": "#aab2c2",
}

_SERIES = [name for name in LIGHT if name.startswith("series-")]
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def series_color(index: int) -> str:
    """Colour of the index-th run or module; they repeat after eight."""
    return LIGHT[_SERIES[index % len(_SERIES)]]


def series_dash(index: int) -> object:
    """Dashes that tell apart those whose colour repeats."""
    return DASHES[index // len(_SERIES) % len(DASHES)]


def css_variables() -> str:
    """The colours as CSS variables, light and dark."""

    def block(colors: dict[str, str]) -> str:
        return "".join(f"--{name}:{value};" for name, value in colors.items())

    dark = block(DARK)
    return f":root{{color-scheme:light dark;{block(LIGHT)}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def with_css_variables(svg: str) -> str:
    """A figure whose light colours are looked up in the page."""
    by_value = {value: name for name, value in LIGHT.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{by_value[m[0]]})" if m[0] in by_value else m[0], svg)
