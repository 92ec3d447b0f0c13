"""The report of one run or several: puts figures and the summary on a page."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gmt_tune.errors import UserError
from gmt_tune.reporting.drawing import require_matplotlib, to_png
from gmt_tune.reporting.figures import build_figures
from gmt_tune.reporting.page import Section, write_page
from gmt_tune.reporting.run_reader import read_runs
from gmt_tune.reporting.summary import summary_tables

__all__ = ["write_report"]

log = logging.getLogger(__name__)


def write_report(
    run_dirs: Sequence[str | Path], output: Path | None = None, png_dir: Path | None = None
) -> tuple[Path, list[Path]]:
    """Draw the report of one run, or of several on the same axes, with PNG files if there is a folder for them.

    Args:
        run_dirs: the runs' output folders.
        output: the page; default, ``report.html`` in the first run's folder.
        png_dir: folder for a PNG file of each figure; default, none.

    Returns:
        The page's path, and those of the PNG files.

    Raises:
        UserError: if no folder holds a run (of several, those that do not are left out with a warning), a file cannot
            be written, or matplotlib is missing.
    """
    require_matplotlib()
    runs = read_runs(run_dirs)
    over_time, by_layer = build_figures(runs)
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    sections = [
        Section("Summary", tables=summary_tables(runs)),
        Section("Over the run", figures=over_time),
        Section("By layer and module", figures=by_layer, in_pairs=len(runs) == 2),
    ]
    output = Path(output) if output is not None else runs[0].path / "report.html"
    write_page(output, f"Fine-tuning report: {title}", sections, "gmt-tune report")
    pngs = [to_png(figure, Path(png_dir)) for figure in (*over_time, *by_layer)] if png_dir is not None else []
    return output, pngs


def report_at_end(run_dir: str | Path) -> str:
    """Draw the report of a run that ends, which no fault of it may disturb; returns a sentence on where it is."""
    try:
        page, _ = write_report([run_dir])
        return f"its report is {page.resolve()}"
    except UserError as error:
        return f"it has no report ({error}); to draw it: gmt-tune report {run_dir}"
    except Exception:
        log.warning("The report of %s could not be drawn: the run itself is complete.", run_dir, exc_info=True)
        return f"to draw it: gmt-tune report {run_dir}"
