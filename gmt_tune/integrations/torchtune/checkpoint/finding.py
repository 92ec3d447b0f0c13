"""Which checkpoint a run goes on from, and what in its folder makes way for it: rank 0's business."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import folder as folders
from gmt_tune.integrations.torchtune.checkpoint.config_differences import config_differences
from gmt_tune.integrations.torchtune.checkpoint.manifest import FORMAT, Checkpoint
from gmt_tune.integrations.torchtune.checkpoint.model import check_config_json
from gmt_tune.integrations.torchtune.config.files import file_names
from gmt_tune.reporting.weights_reader import DELTA

log = utils.get_logger("INFO")


def find_checkpoint(
    cfg: DictConfig, inputs: dict[str, str], world_size: int, dataset_rows: int, rows_of_a_step: int
) -> Checkpoint | None:
    """The newest whole checkpoint, if the config asks to go on from it; else earlier ones are moved aside.

    Args:
        cfg: the recipe's.
        inputs: of ``inputs_in``: what the config reads in its own ``output_dir``.
        world_size, dataset_rows, rows_of_a_step: of this run, as a manifest's ``Progress`` has them.

    Raises:
        UserError: if the config or the data contradict that checkpoint, or the run would move what it reads.
    """
    output_dir = Path(cfg.checkpointer.output_dir)
    found = folders.newest_whole(output_dir, log.warning) if cfg.resume_from_checkpoint else None
    _check_inputs(cfg, inputs, found is not None)
    if found is not None and found.format != FORMAT:
        raise UserError(
            f"{found.path} was saved by an earlier version of gmt-tune, whose training state this one cannot read: "
            f"go on with that version, or start a new run from its weights with {new_run_from(found, cfg)}"
        )
    folders.remove_incomplete(output_dir)
    if not cfg.resume_from_checkpoint:
        moved = folders.move_aside(output_dir)
        if moved is not None:
            log.info(f"Moved the checkpoints of an earlier run to {moved}.")
        return None
    if found is not None:
        _check_same_training(found, cfg, world_size, dataset_rows, rows_of_a_step)
    aside = folders.set_damaged_aside(output_dir, found)
    for path in aside:
        log.warning(f"Kept what is left of a damaged checkpoint as {path}: delete it if it is of no use.")
    if found is not None:
        log.info(f"Going on from {found.path} (step {found.step}).")
    elif aside:
        log.warning(f"None of the checkpoints in {output_dir} is whole: starting from the beginning.")
    else:
        log.info(f"No checkpoint in {output_dir} yet: starting from the beginning.")
    return found


def new_run_from(found: Checkpoint, cfg: DictConfig) -> str:
    """What to write at the end of a command line for a new run from a checkpoint's weights, and not its state."""
    written = found.progress.model_files
    if not written:
        base = shlex.join(["gmt-tune", "apply", cfg.checkpointer.checkpoint_dir, str(found.path / DELTA), "DIR"])
        return f"checkpointer.checkpoint_dir=DIR output_dir={found.path.parent}_next, after `{base}`"
    words = [f"checkpointer.checkpoint_dir={found.path}"]
    given = cfg.checkpointer.checkpoint_files
    numbers = re.fullmatch(r"(.*?)\d+-of-(\d+)(.*)", written[-1])
    if file_names("checkpointer", given) != written:
        if OmegaConf.is_dict(given) and numbers is not None:  # OmegaConf puts no list in the place of a section
            words.append(f"checkpointer.checkpoint_files.filename_format={numbers[1]}{{}}-of-{{}}{numbers[3]}")
            words.append(f"checkpointer.checkpoint_files.max_filename={numbers[2]}")
        else:
            words.append(f"checkpointer.checkpoint_files=[{','.join(written)}]")
    words.append(f"output_dir={found.path.parent}_next")
    return shlex.join(words)


def _check_inputs(cfg: DictConfig, inputs: dict[str, str], is_resumed: bool) -> None:
    """Raise UserError if this run would move or delete a file that its config names, or cannot read its model."""
    for section in ("ref_checkpointer",) if is_resumed else ("checkpointer", "ref_checkpointer"):
        given = cfg.get(section, None)
        if given is None:
            continue
        if Path(given.output_dir).resolve().is_relative_to(Path(given.checkpoint_dir).resolve()):
            raise UserError(
                f"{section}.output_dir {given.output_dir} is in {section}.checkpoint_dir {given.checkpoint_dir}: "
                "choose an output_dir outside of the model's folder"
            )
        check_config_json(given)
    output_dir = Path(cfg.checkpointer.output_dir)
    own = {c.path.name for c in folders.list_checkpoints(output_dir)} if is_resumed else set()
    for name, key in inputs.items():
        if folders.is_the_runs(name) and name not in own:
            raise UserError(
                f"{key} is in {output_dir / name}, which this run would move aside or write over: choose another "
                "output_dir"
            )


def _check_same_training(
    found: Checkpoint, cfg: DictConfig, world_size: int, dataset_rows: int, rows_of_a_step: int
) -> None:
    """Raise UserError if this run would not go on with the training that a checkpoint was saved in."""
    saved = found.progress
    differing = config_differences(saved.config, saved.environment, cfg)
    if saved.world_size != world_size and saved.rows_of_a_step == rows_of_a_step:
        # What makes the same steps on another number of ranks
        differing = [d for d in differing if not d.startswith(("batch_size ", "gradient_accumulation_steps "))]
    if saved.dataset_rows != dataset_rows:
        differing.append(f"dataset has {dataset_rows} rows, had {saved.dataset_rows}")
    if differing:
        raise UserError(
            f"the config differs from the run that saved {found.path}: {'; '.join(differing)}. Set it as it was, or "
            "start a new run with resume_from_checkpoint: False or another output_dir"
        )
