"""``gmt-tune apply``: a fine-tuned checkpoint of its base and a delta, or the base of the checkpoint."""

from __future__ import annotations

import argparse

from gmt_tune.cli.folders import with_progress
from gmt_tune.cli.paths import as_path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "apply",
        help="make a fine-tuned checkpoint of its base and a delta",
        description="Make the folder of the fine-tuned checkpoint again, bit for bit, with config and tokenizer, of "
        "its base and the file that `gmt-tune delta`, or a recipe with save_delta: True, wrote.",
        epilog="Example: gmt-tune apply /tmp/SmolLM2-135M-Instruct tuned.safetensors /tmp/tuned",
    )
    parser.add_argument(
        "base",
        metavar="BASE",
        type=as_path,
        help="folder that the tuning started from; with --remove, the tuned one",
    )
    parser.add_argument("delta", metavar="DELTA", type=as_path, help="file of `gmt-tune delta`")
    parser.add_argument("out", metavar="OUT", type=as_path, help="folder to make")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--remove", action="store_true", help="the other way: make the base of the tuned checkpoint")
    what.add_argument(
        "--adapter", action="store_true", help="make a SHiRA adapter instead, which PEFT loads on top of the base"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from gmt_tune.deltas import Delta, rebuild, write_adapter

    delta, watch = Delta(args.delta), with_progress()
    if args.adapter:
        write_adapter(args.base, delta, args.out, watch=watch)
    else:
        for name in rebuild(args.base, delta, args.out, remove=args.remove, watch=watch):
            print(f"{name} was left out: {args.base} does not have it as it was")
    print(f"Wrote {args.out.resolve()}")
    return 0
