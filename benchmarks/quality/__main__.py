"""Command line: ``run`` makes results, ``table`` makes pages and figures of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from benchmarks import command_line
from benchmarks.quality import experiment, results
from gmt_tune.errors import UserError

_WORK = Path("/tmp/gmt-tune/quality")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="make the results of a suite that are missing; can be stopped and repeated")
    run.set_defaults(command=_run)
    run.add_argument("suite", help=f"one of {', '.join(experiment.suite_names())}")
    run.add_argument("methods", nargs="*", help="of the suite's methods; default all of them, in their order")
    run.add_argument("--choose", action="store_true", help="only the runs that choose the learning rate")
    run.add_argument("--seeds", type=int, nargs="+", help="only these")
    run.add_argument("--lr", type=float, help="this learning rate, instead of the chosen one")
    run.add_argument("--again", action="store_true", help="also what is done already")
    run.add_argument("--fork", action="store_true", help="start runs as forks of one process: no imports each time")
    run.add_argument("--keep", action="store_true", help="keep checkpoints and logs in the work folder")
    run.add_argument("--work", type=Path, default=_WORK, help=f"for data and checkpoints (default {_WORK})")

    show = commands.add_parser("config", help="print the config that one run gives to `tune run`")
    show.set_defaults(command=_config)
    show.add_argument("suite")
    show.add_argument("method")
    show.add_argument("--seeds", type=int, nargs=1, default=[0], dest="seeds")
    show.add_argument("--lr", type=float, required=True)
    show.add_argument("--work", type=Path, default=_WORK)

    listing = commands.add_parser("list", help="what there is, and how many runs are done")
    listing.set_defaults(command=_list)

    table = commands.add_parser("table", help="write docs/results: tables and figures from the JSON lines")
    table.set_defaults(command=_table)
    return parser


def _run(args: argparse.Namespace) -> None:
    from benchmarks.quality.runner import Runner

    suite = experiment.load_suite(args.suite)
    names = args.methods or suite.methods
    methods = [experiment.load_method(name) for name in names]
    runner = Runner(args.work, fork=args.fork, keep=args.keep)
    if args.again:
        for method in methods:
            _forget(suite, method, args)
    failed = []

    def attempt(make, *arguments) -> None:
        try:
            make(*arguments)
        except UserError as error:  # one broken run does not stop a night of others
            print(f"Error: {error}", file=sys.stderr, flush=True)
            failed.append(error)

    if args.choose and args.lr:
        for method in methods:
            for seed in args.seeds or suite.choose["seeds"]:
                attempt(runner.run, experiment.Run(suite, method, args.lr, seed, "choose"))
    elif args.choose:
        for method in methods:
            attempt(runner.choose, suite, method)
    else:
        attempt(runner.base, suite)
        if args.lr is None:
            for method in methods:
                attempt(runner.choose, suite, experiment.load_method(method.learning_rate_of))
        for seed in args.seeds or suite.seeds:  # the outer loop: every method has its first seeds early
            for method in methods:
                attempt(runner.measure, suite, method, seed, args.lr)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed; the same command tries them again")


def _forget(suite: experiment.Suite, method: experiment.Method, args: argparse.Namespace) -> None:
    for name in results.read_all(suite.name):
        _, of_method, run = name.split("/")
        phase, rate, seed = run.split("_")
        if (
            of_method == method.name
            and phase == ("choose" if args.choose else "measure")
            and (args.lr is None or float(rate.removeprefix("lr")) == args.lr)
            and (args.seeds is None or int(seed.removeprefix("seed")) in args.seeds)
        ):
            results.forget(name)


def _config(args: argparse.Namespace) -> None:
    from benchmarks.quality.runner import Runner

    suite, method = experiment.load_suite(args.suite), experiment.load_method(args.method)
    run = experiment.Run(suite, method, args.lr, args.seeds[0], "measure")
    folder = args.work / run.name / run.key()
    print(f"# tune run {method.recipe} --config THIS_FILE")
    print(yaml.safe_dump(Runner(args.work).config(run, folder), sort_keys=False), end="")


def _list(args: argparse.Namespace) -> None:
    for name in experiment.suite_names():
        suite = experiment.load_suite(name)
        print(f"{name}: {suite.title}")
        for method_name in suite.methods:
            method = experiment.load_method(method_name)
            rate = results.chosen_learning_rate(suite, method)
            done = len(results.measured(suite, method))
            chosen = "not chosen yet" if rate is None else f"{rate:g}"
            print(f"  {method_name:24} learning rate {chosen:14} {done} of {len(suite.seeds)} seeds")


def _table(args: argparse.Namespace) -> None:
    from benchmarks.quality.report import write_report

    for file in write_report():
        print(file)


if __name__ == "__main__":
    sys.exit(main())
