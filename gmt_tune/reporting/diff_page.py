"""Pictures of how far a checkpoint went from its base: a page, and PNG files."""

import math
from pathlib import Path

from gmt_tune.reporting.diff import COLUMNS, Diff
from gmt_tune.reporting.drawing import Figure, Table, to_png
from gmt_tune.reporting.figures import grid_figure
from gmt_tune.reporting.page import Section, write_page
from gmt_tune.reporting.parameter_names import to_grid
from gmt_tune.reporting.plots import draw_bars


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


def draw_diff(
    diff: Diff, base: Path, tuned: Path, *, html: Path | None = None, png_dir: Path | None = None, top: int = 10
) -> list[Path]:
    """Write what is asked for: a page, and PNG files into a folder. Returns the files. May raise UserError."""
    figures = diff_figures(diff, top)
    if html is not None:
        total = diff.total
        lead = (
            f"{total.numel:,} entries in {total.tensors} tensors: {total.fraction:.2%} changed, norm of the change "
            f"{total.norm:.4g}, which is {total.relative:.3g} of the base's norm. " + " ".join(diff.notes)
        )
        tables = [
            (
                f"By {group}",
                Table([group, *COLUMNS], [[str(name), *change.cells()] for name, change in changes.items()]),
            )
            for group, changes in (("module", diff.by_module()), ("layer", diff.by_layer()))
            if changes
        ]
        title = f"What changed from {base.resolve().name} to {tuned.resolve().name}"
        sections = [Section("Pictures", figures=figures), Section("Numbers", tables=tables)]
        write_page(html, title, sections, "gmt-tune diff", lead)
    pngs = [to_png(figure, png_dir) for figure in figures] if png_dir is not None else []
    return [*([html] if html is not None else []), *pngs]


def _label(name: str, longest: int = 26) -> str:
    name = name.removeprefix("model.").removesuffix(".weight")
    return name if len(name) <= longest else "…" + name[-longest + 1 :]
