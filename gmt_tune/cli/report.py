"""``gmt-tune report``: one HTML page that shows what a run did."""

import argparse

from gmt_tune.cli.paths import as_path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="draw a run, or several on the same axes, as one HTML page",
        description="Draw what a run logged as one HTML page without scripts or network: losses, learning rate, "
        "density by layer and module, thresholds, throughput, memory. Several runs are drawn on the same axes; folders "
        "that cannot be read are left out with a warning.",
        epilog="Example: gmt-tune report /tmp/run_a /tmp/run_b -o comparison.html",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=as_path, help="the output_dir of a run")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=as_path, help="the page (default: report.html in the first RUN_DIR)"
    )
    parser.add_argument(
        "--png", metavar="DIR", type=as_path, help="write each figure as a PNG file into this folder too"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from gmt_tune.reporting.report import write_report

    page, pngs = write_report(args.run_dirs, args.output, args.png)
    print(f"Wrote {page.resolve()}")
    if pngs:
        print(f"Wrote {len(pngs)} PNG files to {pngs[0].parent.resolve()}")
    return 0
