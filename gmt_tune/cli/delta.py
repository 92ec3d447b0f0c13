"""``gmt-tune delta``: a fine-tune as a small file."""

from __future__ import annotations

import argparse

from gmt_tune.cli.folders import add_base_and_tuned, with_progress
from gmt_tune.cli.paths import as_path
from gmt_tune.errors import UserError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "delta",
        help="write what a fine-tuned checkpoint changed as a small file",
        description="Write the places and bits of all entries in which a fine-tuned checkpoint differs from its base, "
        "its config and tokenizer too where they differ. `gmt-tune apply` makes the checkpoint of the base and this "
        "file again, bit for bit. Reads slice by slice: a model of 8B parameters needs little memory.",
        epilog="Example: gmt-tune delta /tmp/SmolLM2-135M-Instruct /tmp/run/epoch_0 tuned.safetensors",
    )
    add_base_and_tuned(parser)
    parser.add_argument("out", metavar="OUT", type=as_path, help="file to write, such as tuned.safetensors")
    parser.add_argument("--force", action="store_true", help="write it also if most entries differ")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from gmt_tune.cli.diff import as_lines
    from gmt_tune.deltas import LargeDeltaError, make_delta

    if args.out.suffix != ".safetensors":
        raise UserError(f"OUT is {args.out}: name a file that ends in .safetensors")
    if args.out.exists():
        raise UserError(f"{args.out} exists already: name another file, or delete it")
    try:
        made = make_delta(args.base, args.tuned, args.out, force=args.force, watch=with_progress())
    except LargeDeltaError as error:
        raise UserError(f"{error}. --force writes it all the same") from None
    print("\n".join(as_lines(made.diff, top=10)))
    print(f"Wrote {args.out.resolve()}: {made}")
    return 0
