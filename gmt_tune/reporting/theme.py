"""Colours of pages and figures, for light and dark screens.

Figures are drawn once, with the light colours; in a page, each of these becomes a CSS variable that a dark screen
gives another value.
"""

import re

# Name to (on light screens, on dark ones)
COLORS = {
    "ink": ("#1f2430", "#e7e9ef"),
    "muted": ("#646b7c", "#a0a7b6"),
    "grid": ("#e3e5ea", "#343a48"),
    "card": ("#fffffe", "#1b1f29"),
    "page": ("#f4f5f7", "#12151c"),
    "series-0": ("#2563ab", "#6fa8ea"),
    "series-1": ("#c8530f", "#f0914f"),
    "series-2": ("#17803e", "#5cc47f"),
    "series-3": ("#8e3fc0", "#c591ea"),
    "series-4": ("#b4235a", "#ee7ba4"),
    "series-5": ("#0d7685", "#4fc0d0"),
    "series-6": ("#8a6a08", "#d9b64a"),
    "series-7": ("#5b6474", "#aab2c2"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}

_SERIES = [name for name in COLORS if name.startswith("series-")]
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def series_color(index: int) -> str:
    """Colour of the index-th run or module; they repeat after eight."""
    return LIGHT[_SERIES[index % len(_SERIES)]]


def series_dash(index: int) -> object:
    """Dashes that tell apart those whose colour repeats."""
    return _DASHES[index // len(_SERIES) % len(_DASHES)]


def with_css_variables(svg: str) -> str:
    """A figure whose light colours are looked up in the page."""
    by_value = {value: name for name, value in LIGHT.items()}
    return re.sub("|".join(by_value), lambda match: f"var(--{by_value[match[0]]})", svg)
