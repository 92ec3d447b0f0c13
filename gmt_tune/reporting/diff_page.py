"""Pictures of how far a checkpoint went from its base: a page, and PNG files."""

from __future__ import annotations

import math
from pathlib import Path

from gmt_tune.reporting.diff import Change, Diff
from gmt_tune.reporting.drawing import Figure, Table, to_png
from gmt_tune.reporting.figures import grid_figure
from gmt_tune.reporting.page import Section, write_page
from gmt_tune.reporting.parameter_names import to_grid
from gmt_tune.reporting.plots import draw_bars

_HEADER = ("entries", "changed", "norm of change", "relative", "largest")


def diff_figures(diff: Diff, top: int = 10) -> list[Figure]:
    """The figures for a diff: two heat maps where the model has layers, and the tensors that moved most."""
    figures = []
    maps = (
        ("changed", "Changed entries by layer and module", "Fraction of the entries that differ.", "fraction"),
        ("relative", "Change by layer and module", "Norm of the change over the norm of the base.", "relative"),
    )
    for key, title, note, attribute in maps:
        numbers = {name: getattr(change, attribute) for name, change in diff.tensors.items()}
        grid = to_grid(numbers)
        values = [value for value, _, _ in grid.cells()]
        if not values:
            continue
        seen = f", from {min(values):.3g} to {max(values):.3g}."
        figures.append(grid_figure(key, title, note, seen, grid, label=key))
    moved = [(name, change) for name, change in diff.moved_most(top) if math.isfinite(change.relative)]
    if moved:
        labels = [_label(name) for name, _ in moved]
        values = [change.relative for _, change in moved]
        figures.append(
            Figure(
                key="moved-most",
                title="Tensors that moved most",
                note="Norm of the change over the norm of the base.",
                alt=f"Bars, from {values[0]:.3g} for {moved[0][0]} down to {values[-1]:.3g} for {moved[-1][0]}.",
                draw=lambda canvas: draw_bars(canvas, labels, values, xlabel="relative change"),
                height=50 + 24 * len(labels),
            )
        )
    return figures


def write_diff_page(diff: Diff, base: Path, tuned: Path, output: Path, top: int = 10) -> None:
    """Write the page.

    Raises:
        UserError: if it cannot be written, or matplotlib is missing.
    """
    total = diff.total
    lead = (
        f"{total.numel:,} entries in {total.tensors} tensors: {total.fraction:.2%} changed, norm of the change "
        f"{total.norm:.4g}, which is {total.relative:.3g} of the base's norm. " + " ".join(diff.notes)
    )
    tables = [
        ("By module", _table("module", diff.by_module())),
        ("By layer", _table("layer", {str(layer): change for layer, change in diff.by_layer().items()})),
    ]
    write_page(
        output,
        f"What changed from {base.resolve().name} to {tuned.resolve().name}",
        [
            Section("Pictures", figures=diff_figures(diff, top)),
            Section("Numbers", tables=[(caption, table) for caption, table in tables if table.rows]),
        ],
        "gmt-tune diff",
        lead,
    )


def write_diff_pngs(diff: Diff, folder: Path, top: int = 10) -> list[Path]:
    """Write the figures as PNG files into a folder."""
    return [to_png(figure, folder) for figure in diff_figures(diff, top)]


def _table(what: str, changes: dict[str, Change]) -> Table:
    rows = [
        [
            name,
            f"{change.numel:,}",
            f"{change.fraction:.2%}",
            f"{change.norm:.4g}",
            f"{change.relative:.3g}",
            f"{change.largest:.3g}",
        ]
        for name, change in changes.items()
    ]
    return Table([what, *_HEADER], rows)


def _label(name: str, longest: int = 26) -> str:
    name = name.removeprefix("model.").removesuffix(".weight")
    return name if len(name) <= longest else "…" + name[-longest + 1 :]
