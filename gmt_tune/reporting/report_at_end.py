"""The report that a run draws of itself when it ends: whatever is wrong with it must not end the run."""

from __future__ import annotations

import logging
from pathlib import Path

from gmt_tune.errors import UserError

log = logging.getLogger(__name__)


def report_at_end(run_dir: str | Path) -> str:
    """Draw a run's report into its folder.

    Returns:
        A sentence for the run's last line: where the report is, or how to get one.
    """
    from gmt_tune.reporting.report import write_report

    try:
        page, _ = write_report([run_dir])
        return f"its report is {page.resolve()}"
    except UserError as error:
        return f"it has no report ({error}); to draw it: gmt-tune report {run_dir}"
    except Exception:
        log.warning("The report of %s could not be drawn: the run itself is complete.", run_dir, exc_info=True)
        return f"to draw it: gmt-tune report {run_dir}"
