"""What the commands that go through two folders of weights share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial

from gmt_tune.cli.paths import as_path


def add_base_and_tuned(parser: argparse.ArgumentParser) -> None:
    """``BASE`` and ``TUNED``."""
    parser.add_argument("base", metavar="BASE", type=as_path, help="folder (or one file) that the tuning started from")
    parser.add_argument("tuned", metavar="TUNED", type=as_path, help="folder (or one file) that the tuning made")


def with_progress(doing: str | None = None) -> Callable[[Iterable[str]], Iterable[str]]:
    """Function that wraps names of tensors in a bar that shows how far they are gone through, on a terminal alone."""
    from tqdm import tqdm

    return partial(tqdm, desc=doing, unit="tensor", disable=None, leave=False)
