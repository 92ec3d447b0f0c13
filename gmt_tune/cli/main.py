"""``gmt-tune``: the commands that go with the recipes. Each lives in a module of its own."""

import argparse
import sys

from gmt_tune._version import __version__
from gmt_tune.cli import apply, delta, diff, env, fetch, memory, report, try_run
from gmt_tune.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each module adds its own with ``add_parser(subparsers)``."""
    parser = argparse.ArgumentParser(
        prog="gmt-tune",
        description="Companion commands of gmt-tune. Training itself is `tune run gmt_full_finetune --config ...`.",
    )
    parser.add_argument("--version", action="version", version=f"gmt-tune {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="COMMAND")
    for command in (fetch, memory, try_run, report, diff, delta, apply, env):
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.func(args)
    except UserError as error:
        print(f"gmt-tune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmt-tune: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
