"""Command line: ``run`` and ``check`` make results, ``table`` makes the page of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import command_line
from benchmarks.peers.methods import METHODS, method
from benchmarks.peers.runs import CHECKS, Check, Run, Runner
from benchmarks.quality import results
from gmt_tune.errors import UserError

_WORK = Path("/tmp/gmt-tune/peers")
_MODEL = Path(os.environ.get("SMOLLM2_DIR", "/tmp/SmolLM2-135M-Instruct"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, command, text in [
        ("run", _run, "make the trainings that are missing; can be stopped and repeated"),
        ("check", _check, "make the checks of accumulation and of two processes that are missing"),
    ]:
        made = commands.add_parser(name, help=text)
        made.set_defaults(command=command)
        made.add_argument("methods", nargs="*", help=f"default all: {', '.join(METHODS)}")
        made.add_argument("--again", action="store_true", help="also what is done already")
        made.add_argument("--work", type=Path, default=_WORK, help=f"for data and logs (default {_WORK})")
        if name == "run":
            made.add_argument("--seeds", type=int, nargs="+", default=[0], help="seed 0 chooses the learning rate")
            made.add_argument("--lr", type=float, help="this learning rate alone, instead of those that choose")
    table = commands.add_parser("table", help="write docs/results/peers.md from the JSON lines")
    table.set_defaults(command=_table)
    return parser


def _run(args: argparse.Namespace) -> None:
    for name in args.methods:
        method(name)
    runner = Runner(_MODEL, args.work)
    runner.base()
    failed = []
    for seed in args.seeds:  # the outer loop: every method has its first seed early
        for name in args.methods or METHODS:
            if args.again:
                _forget(name, lambda kind, seed=seed: kind not in CHECKS and kind.endswith(f"seed{seed}"))
            try:
                rate = args.lr or runner.choose(name)
                if rate is not None:
                    runner.train(Run(name, rate, seed))
            except UserError as error:  # one broken run does not stop the others
                print(f"Error: {error}", file=sys.stderr, flush=True)
                failed.append(name)
    if failed:
        raise UserError(f"runs of {', '.join(failed)} failed; the same command tries them again")


def _check(args: argparse.Namespace) -> None:
    for name in args.methods:
        method(name)
    runner = Runner(_MODEL, args.work)
    for name in args.methods or METHODS:
        if args.again:
            _forget(name, lambda kind: kind in CHECKS)
        for kind in CHECKS:
            runner.check(Check(name, kind))


def _forget(name: str, is_meant) -> None:
    for run in results.read_all("peers"):
        _, of, kind = run.split("/")
        if of == name and is_meant(kind):
            results.forget(run)


def _table(args: argparse.Namespace) -> None:
    from benchmarks.peers.table import write_table

    print(write_table())


if __name__ == "__main__":
    sys.exit(main())
