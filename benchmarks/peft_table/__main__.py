"""Command line: ``run`` makes results, ``table`` makes the page of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import command_line
from benchmarks.peft_table import data, page, runner
from benchmarks.peft_table.experiments import config_file, experiments, methods
from gmt_tune.errors import UserError

_WORK = Path("/tmp/gmt-tune/peft_table")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_table", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="make the results that are missing, then the page; can be repeated")
    run.set_defaults(command=_run)
    run.add_argument(
        "methods", nargs="*", metavar="METHOD or KEY=VALUE", help=f"of {', '.join(methods())}; default all"
    )
    run.add_argument("--lr", type=float, help="this learning rate alone")
    run.add_argument("--data", type=Path, help="folder with metamathqa.jsonl and finewiki.jsonl; default: the hub")
    run.add_argument("--results", type=Path, default=page.RESULTS, help=f"default {page.RESULTS}")
    run.add_argument("--work", type=Path, default=_WORK, help=f"for data and checkpoints (default {_WORK})")
    table = commands.add_parser("table", help="write docs/results/peft_table.md")
    table.set_defaults(command=lambda args: print(page.write_page()))
    simulate = commands.add_parser("simulate", help="peaks on a simulated GPU; takes minutes and PyTorch's CUDA build")
    simulate.set_defaults(command=_simulate)
    return parser


def _run(args: argparse.Namespace) -> None:
    overrides = [word for word in args.methods if "=" in word]
    is_table = args.results == page.RESULTS
    if is_table and (overrides or args.data):
        raise UserError(
            f"{overrides[0] if overrides else '--data'} makes it another experiment than the table's: give --results a "
            "folder of its own"
        )
    wanted = experiments([word for word in args.methods if "=" not in word], args.lr)
    wanted = {experiment: runner.result_file(args.results, experiment) for experiment in wanted}
    missing = [experiment for experiment, file in wanted.items() if not file.is_file()]
    data.check_local(args.data)
    configs = {experiment: runner.config_of(experiment, args.work.absolute(), overrides) for experiment in missing}
    failed = []
    for experiment, config in configs.items():
        try:
            runner.run(experiment, config, results=args.results, local=args.data)
        except UserError as error:  # one broken run does not stop a night of others
            print(f"Error: {error}", file=sys.stderr, flush=True)
            failed.append(experiment)
    for experiment, file in wanted.items():
        if experiment not in failed:
            row = page.row_of(json.loads(file.read_text(encoding="utf-8")))
            shown = {name: row[name] for name in ("test_accuracy", "train_loss", "forgetting*", "train_time")}
            print(f"{file}: {shown}")
    if is_table:
        print(page.write_page())
    if failed:
        raise UserError(f"{len(failed)} of {len(configs)} runs failed; the same command tries them again")


def _simulate(args: argparse.Namespace) -> None:
    from benchmarks.simulated_memory import measure

    found = {method: measure(str(config_file(method))) for method in methods()}
    page.SIMULATED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
