"""The config that a command is about: its arguments, and how it is read."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gmt_tune.errors import UserError, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--world-size``, and overrides as in ``tune run``."""
    parser.add_argument(
        "--world-size",
        metavar="N",
        type=int,
        help="devices; default: as many as the run line at the top of the config says",
    )
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="replaces a key of the config, as in `tune run`"
    )


def check_world_size(args: argparse.Namespace) -> None:
    """Raise UserError if ``--world-size`` was given and is no number of devices."""
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size must be a whole number from 1 on, got {args.world_size}")


def read_config(name: str, overrides: list[str]) -> tuple[DictConfig, str]:
    """A config, named as in ``tune ls`` or a file, with overrides, as ``tune run`` reads it; and its file's text.

    Raises UserError if there is no such config, or it cannot be read.
    """
    from gmt_tune.integrations.torchtune.config.reading import apply_overrides, expand_home, read_file
    from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
    from gmt_tune.integrations.torchtune.plugin.registry import config_file

    register_resolver()
    path = config_file(name)
    with errors_of(name):
        cfg = apply_overrides(read_file(path), overrides)
        expand_home(cfg)
    return cfg, path.read_text(encoding="utf-8")


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Turn what OmegaConf raises within the block into a UserError that names the config."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{name}: {one_line(error)}") from None


def devices_of_run_line(text: str) -> int:
    """The number of devices that the first ``tune run`` in a config's comments starts: nodes times processes."""
    line = re.search(r"^#.*\btune run\b(.*)$", text, re.MULTILINE)
    if line is None:
        return 1
    options = dict(re.findall(r"--(nnodes|nproc[_-]per[_-]node)[ =](\d+)", line.group(1)))
    return int(options.pop("nnodes", 1)) * int(next(iter(options.values()), 1))
