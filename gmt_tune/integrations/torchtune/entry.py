"""How a recipe begins and ends for its user: a checked config first, one sentence when something is wrong."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.assets import register_resolver
from gmt_tune.integrations.torchtune.config_check import check_config

# Set to 1 to see the whole traceback of an error that is otherwise told in one sentence.
DEBUG_VARIABLE = "GMT_TUNE_DEBUG"


class StopRun(Exception):
    """The run was told to stop and has saved.

    Args:
        message: how to go on.
        signal_number: of the signal that stopped it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def run_recipe(cfg: DictConfig, recipe: Callable[[DictConfig], None], own_keys: Sequence[str] = ()) -> int:
    """Check the config, run the recipe, and tell its user what went wrong.

    Args:
        cfg: the parsed config.
        recipe: sets up and trains.
        own_keys: top-level keys that this recipe reads besides those of ``gmt_full_finetune``.

    Returns:
        The exit status: 0, 1 for an error, or 128 and the signal's number for a run that was told to stop.
    """
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    try:
        register_resolver()
        check_config(cfg, own_keys)
        recipe(cfg)
        return 0
    except StopRun as stop:
        if is_rank_zero:
            print(stop, flush=True)
        return 128 + stop.signal_number
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            traceback.print_exc()
        elif is_rank_zero:
            print(f"Error: {error}\n({DEBUG_VARIABLE}=1 shows where it was raised)", file=sys.stderr, flush=True)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
