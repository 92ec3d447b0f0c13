"""The report of one run or several: puts figures and the summary on a page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from gmt_tune._version import __version__
from gmt_tune.reporting.drawing import Figure, require_matplotlib, to_png
from gmt_tune.reporting.figures import build_figures
from gmt_tune.reporting.page import build_page, write_page
from gmt_tune.reporting.run_reader import Run, read_runs
from gmt_tune.reporting.summary import summary_tables


def write_report(
    run_dirs: Sequence[str | Path], output: Path | None = None, png_dir: Path | None = None
) -> tuple[Path, list[Path]]:
    """Draw the report of one run, or of several on the same axes.

    Args:
        run_dirs: output folders of runs.
        output: the HTML file; by default ``report.html`` in the first run's folder.
        png_dir: folder for the figures as PNG files; none by default.

    Returns:
        The page's path, and those of the PNG files.

    Raises:
        UserError: if a folder holds no run, a file cannot be written, or matplotlib is missing.
    """
    require_matplotlib()
    runs = read_runs(run_dirs)
    figures = build_figures(runs)
    output = Path(output) if output is not None else runs[0].path / "report.html"
    write_page(output, _page(runs, figures))
    pngs = [to_png(figure, Path(png_dir)) for figure in figures] if png_dir is not None else []
    return output, pngs


def _page(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    by_layer = [figure for figure in figures if "-map-" in figure.key or "-by-depth-" in figure.key]
    over_time = [figure for figure in figures if figure not in by_layer]
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return build_page(
        f"Fine-tuning report: {title}",
        [
            ("Summary", summary_tables(runs)),
            ("Over the run", over_time),
            ("By layer and module", by_layer),
        ],
        f"Made {made} by gmt-tune {__version__} (gmt-tune report).",
        in_pairs=["By layer and module"] if len(runs) == 2 else [],
    )
