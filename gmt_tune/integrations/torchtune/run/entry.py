"""How a recipe begins and ends for its user: a checked config first, one sentence when something is wrong."""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from gmt_tune.errors import UserError, UserErrorOfOneRank, one_line
from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.config.check import check_config, check_machine
from gmt_tune.integrations.torchtune.config.public import without_secrets_of
from gmt_tune.integrations.torchtune.config.reading import apply_overrides, expand_home, read_file
from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
from gmt_tune.integrations.torchtune.plugin.registry import config_file
from gmt_tune.integrations.torchtune.run.signals import StopRun

__all__ = ["parse", "run_recipe"]

# Set to 1 to see the whole traceback of an error that is otherwise said in one sentence.
DEBUG_VARIABLE = "GMT_TUNE_DEBUG"


def parse(recipe_main: Callable[[DictConfig], int]) -> Callable[[], None]:
    """Decorator of ``recipe_main`` as ``torchtune.config.parse``, whose errors are one sentence each.

    What the command line may say besides is in ``config.reading.apply_overrides``.
    """

    @functools.wraps(recipe_main)
    def main() -> None:
        parser = argparse.ArgumentParser(
            description=recipe_main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--config", required=True, help="name or path of a YAML file with the recipe's arguments")
        args, overrides = parser.parse_known_args()
        try:
            cfg = apply_overrides(read_file(config_file(args.config)), overrides)
        except UserError as error:
            if _is_first_of_node():
                _show(str(error))
            sys.exit(1)
        except Exception as error:
            _show(f"the config or the command line cannot be read ({one_line(error, with_type=True)})")
            sys.exit(1)
        sys.exit(recipe_main(cfg))

    return main


def run_recipe(cfg: DictConfig, recipe: Callable[[DictConfig], None], own_keys: Sequence[str] = ()) -> int:
    """Check the config, run the recipe, and say what went wrong.

    ``cfg`` is given to ``recipe``.
    ``own_keys`` are top-level keys that this recipe reads besides those of ``gmt_full_finetune``. Returns the exit
    status: 0, 1 for an error, or 128 and the signal's number for a run that was asked to stop.
    """
    is_first_of_node = _is_first_of_node()  # a run may set LOCAL_RANK
    try:
        register_resolver()
        expand_home(cfg)
        check_config(cfg, own_keys)
        check_machine(cfg)
        recipe(cfg)
        status = 0
    except StopRun as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, flush=True)
        status = 128 + stop.signal_number
    except UserError as error:
        if is_first_of_node or isinstance(error, UserErrorOfOneRank):
            # It may come after hours, from code of the user's own
            kept = _keep_traceback(cfg) if isinstance(error, UserErrorOfOneRank) and error.__cause__ else ""
            _show(f"{error}{kept}")
        status = 1
    except torch.OutOfMemoryError as error:
        _show(
            f"out of memory on {cfg.device} ({one_line(error, with_type=True)}): lower batch_size or "
            "tokenizer.max_seq_len, set enable_activation_checkpointing: True, or take a config ending in _low_memory; "
            "`gmt-tune memory` counts"
        )
        status = 1
    except Exception as error:
        # No fault that we know: after a day of training nobody wants to repeat it in order to see the traceback
        _show(f"{without_secrets_of(cfg, one_line(error, with_type=True)[:1000])}{_keep_traceback(cfg)}")
        status = 1
    process_group.leave(has_failed=status == 1)
    return status


def _is_first_of_node() -> bool:
    """Whether this process says what is wrong: often it is wrong for all ranks, but a file can lack on one node."""
    return process_group.local_rank() in (None, "0")


def _show(message: str) -> None:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exc()
    else:
        print(f"Error: {message}\n({DEBUG_VARIABLE}=1 shows where it was raised)", file=sys.stderr, flush=True)


def _keep_traceback(cfg: DictConfig) -> str:
    """Write the traceback of the error at hand to a file in ``output_dir``, and say so."""
    file = Path(str(cfg.get("output_dir", "."))) / f"error_of_rank{os.environ.get('RANK', '0')}.txt"
    try:
        file.write_text(without_secrets_of(cfg, traceback.format_exc()))
    except OSError:
        return ""
    return f" (its traceback is in {file})"
