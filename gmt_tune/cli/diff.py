"""``gmt-tune diff``: how far a fine-tuned checkpoint went from its base."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gmt_tune.cli.folders import add_base_and_tuned, with_progress
from gmt_tune.cli.paths import as_path

if TYPE_CHECKING:
    from gmt_tune.reporting.diff import Diff
    from gmt_tune.reporting.weights_reader import Weights


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "diff",
        help="show how far a fine-tuned checkpoint went from its base",
        description="Compare two folders of safetensors tensor by tensor: fraction of entries changed, norm of the "
        "change (also relative to the base's norm), and what moved most. Reads slice by slice: a model of 8B "
        "parameters needs little memory.",
        epilog="Example: gmt-tune diff /tmp/SmolLM2-135M-Instruct /tmp/run/epoch_0 --html diff.html",
    )
    add_base_and_tuned(parser)
    parser.add_argument("--top", metavar="N", type=_count, default=10, help="tensors that moved most (default: 10)")
    parser.add_argument("--tensors", action="store_true", help="print a row for every tensor too")
    parser.add_argument("--json", action="store_true", help="print everything, tensor by tensor, as JSON instead")
    parser.add_argument("--html", metavar="FILE", type=as_path, help="write pictures and tables as a page too")
    parser.add_argument(
        "--png", metavar="DIR", type=as_path, help="write the pictures as PNG files into this folder too"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from gmt_tune.reporting.diff import compare
    from gmt_tune.reporting.weights_reader import Weights

    if args.html or args.png:
        from gmt_tune.reporting.diff_page import draw_diff
        from gmt_tune.reporting.drawing import require_matplotlib

        require_matplotlib()  # now rather than after minutes of reading
    base, tuned = Weights(args.base), Weights(args.tuned)
    diff = compare(base, tuned, with_progress("Comparing"))
    written: list[Path] = []
    if args.html or args.png:
        written = draw_diff(diff, base.path, tuned.path, html=args.html, png_dir=args.png, top=args.top)
    if args.json:
        print(_as_json(diff))
    else:
        lines = as_lines(diff, top=args.top, tensors=args.tensors)
        print("\n".join([*lines, *(f"Wrote {path.resolve()}" for path in written)]).rstrip())
    return 0


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def _as_json(diff: Diff) -> str:
    return json.dumps(
        {
            "base": str(diff.base.path),
            "tuned": str(diff.tuned.path),
            "total": diff.total.to_dict(),
            "by_module": {name: change.to_dict() for name, change in diff.by_module().items()},
            "by_layer": {str(layer): change.to_dict() for layer, change in diff.by_layer().items()},
            "tensors": {name: change.to_dict() for name, change in diff.tensors.items()},
            "only_in_base": diff.missing,
            "only_in_tuned": diff.extra,
            "reshaped": diff.reshaped,
            "notes": diff.notes,
        },
        indent=2,
    )


def as_lines(diff: Diff, *, top: int, tensors: bool = False) -> list[str]:
    """The tables for a terminal.

    Args:
        top: as many tensors that moved most.
        tensors: a row for every tensor too.
    """
    lines = [_described("BASE ", diff.base), _described("TUNED", diff.tuned), *diff.notes, ""]
    if total := diff.total:
        lines += _table("", [("all", total)])
    if by_module := diff.by_module():
        lines += _table("module", by_module.items())
    if by_layer := diff.by_layer():
        lines += _table("layer", [(str(layer), change) for layer, change in by_layer.items()])
    if tensors:
        lines += _table("tensor", diff.tensors.items())
    if moved := diff.moved_most(top):
        lines += _table("moved most", moved)
    return lines


def _described(side: str, weights: Weights) -> str:
    dtypes = ", ".join(sorted({info.dtype for info in weights.tensors.values()}))
    count = len(weights.files)
    return f"{side} {weights.path} ({len(weights.tensors)} tensors, {dtypes}, {count} file{'s' * (count > 1)})"


def _table(heading: str, changes) -> list[str]:
    """Lines of a table: names on the left, numbers on the right of their columns."""
    from gmt_tune.reporting.diff import COLUMNS

    rows = [[heading, "tensors", *COLUMNS]]
    for name, change in changes:
        rows.append([name, str(change.tensors), *change.cells()])
        if change.nonfinite:
            rows[-1][-1] += f" ({change.nonfinite:,} not finite)"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return [*lines, ""]
