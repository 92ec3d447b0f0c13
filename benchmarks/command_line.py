"""What the command lines of several benchmarks share."""

from __future__ import annotations

import argparse
import sys

from gmt_tune.errors import UserError


def run(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parse the arguments and call their ``command`` with them; a UserError ends in one line.

    Returns:
        the exit code.
    """
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0
