"""The mask's file in a Trainer checkpoint: ``gradient_mask.pt``, beside ``optimizer.pt``.

Where parameters are sharded, each rank stores its own part of a selection, in a file of its own. A callback does not
learn from which folder the Trainer resumes. The files are therefore looked for where that folder most likely is, and
carry a fingerprint of the Trainer's own state, so that the mask of another run's checkpoint of the same name is never
taken.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from gmt_tune.errors import one_line
from gmt_tune.masking import GradientMask
from gmt_tune.masking.parts import is_sharded

FILE_NAME = "gradient_mask.pt"

logger = logging.get_logger(__name__)


def save_mask(mask: GradientMask, args: TrainingArguments, state: TrainerState, *, is_compact: bool) -> None:
    """Write the mask into the checkpoint that the Trainer has just written. Called on every rank."""
    if args.save_only_model or state.is_hyper_param_search:  # nobody resumes from these
        return
    mask_state, shards = mask.state_dict(), _shards(mask, args)
    name = _rank_file(args) if shards > 1 and mask_state["selections"] else FILE_NAME
    if name == FILE_NAME and not args.should_save:
        return
    path = _own_checkpoint(args, state) / name
    partial = path.with_suffix(".partial")
    content = {"mask": mask_state, "shards": shards, "compact": is_compact, "trainer_state": _fingerprint(state)}
    torch.save(content, partial)
    os.replace(partial, path)  # a file with the final name is always whole


def restore_mask(mask: GradientMask, args: TrainingArguments, state: TrainerState, compact: Optimizer | None) -> None:
    """Continue from the mask in the checkpoint that the Trainer resumes from. Called on every rank.

    Args:
        mask: registered, so that it knows how parameters are sharded.
        args, state: of the run that resumes.
        compact: the optimizer, if its states lie by the mask's selection; the Trainer has loaded it.

    Raises ValueError if policy, parameters, sharding or the kind of optimizer differ from what was saved, and
    FileNotFoundError if there is no file, and the selection depends on what it holds.
    """
    folders = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    folders.append(_own_checkpoint(args, state))
    for path in (folder / name for folder in folders for name in (_rank_file(args), FILE_NAME)):
        if path.is_file():
            content = _read(path)
            if content["trainer_state"] == _fingerprint(state):
                _check_shards(content, _shards(mask, args))
                _check_optimizer(path.parent, content.get("compact", False), compact)
                mask.load_state_dict(content["mask"])
                return
    if not mask.keeps_selections and mask.score != "random" and compact is None:
        # Each step makes a selection of its own gradient: nothing is lost but the count of steps.
        steps = dict.fromkeys(mask.state_dict()["steps"], state.global_step)
        mask.load_state_dict({"policy": mask.policy(), "steps": steps, "selections": {}})
        looked_in = " or ".join(dict.fromkeys(str(folder) for folder in folders))
        logger.warning(f"no {FILE_NAME} of this run in {looked_in}: masking from step {state.global_step} on")
        return
    raise FileNotFoundError(
        f"{_why_missing(folders, args, state)}; the selection is needed to go on with refresh_every="
        f"{mask.refresh_every} and score={mask.score!r}"
    )


def _read(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["trainer_state"], content["mask"]["selections"], content["shards"]
    except Exception as error:  # a damaged zip archive or pickle raises whatever its bytes lead to
        raise ValueError(
            f"{path} is truncated or damaged ({one_line(error)[:200]}): resume from an older checkpoint"
        ) from error
    return content


def _why_missing(folders: list[Path], args: TrainingArguments, state: TrainerState) -> str:
    """Why no folder holds the mask that is looked for, and what to do about it."""
    resumed = next((folder for folder in folders if _is_resumed(folder, state)), None)
    if resumed is None or (resumed / FILE_NAME).is_file():
        looked_in = " or ".join(dict.fromkeys(str(folder) for folder in folders))
        return (
            f"no {FILE_NAME} of this run in {looked_in}: set resume_from_checkpoint in the training arguments to the "
            "folder that you resume from"
        )
    if any(resumed.glob("gradient_mask_rank*.pt")):
        return f"the mask in {resumed} was saved by another number of processes than {args.world_size}: start as many"
    why = "a run without GradientMaskCallback wrote it, or the file was removed"
    if not any(resumed.glob("*optimizer*")):  # optimizer.pt, optimizer_0/, ...
        why = "it was written with save_only_model=True, which keeps neither optimizer nor mask"
    return (
        f"{resumed} holds no {FILE_NAME}, since {why}: begin a new run with that folder as the model, or resume from a "
        "checkpoint that holds the file"
    )


def _is_resumed(folder: Path, state: TrainerState) -> bool:
    """Whether the Trainer's state is the one that this folder holds."""
    try:
        return _fingerprint(TrainerState.load_from_json(str(folder / "trainer_state.json"))) == _fingerprint(state)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _check_shards(content: dict, shards: int) -> None:
    if content["mask"]["selections"] and content["shards"] != shards:
        raise ValueError(
            f"the gradient mask's selection was saved in {content['shards']} part(s), and there are {shards} now: "
            "resume with the number of processes and the sharding that it was saved with"
        )


def _check_optimizer(folder: Path, was_compact: bool, compact: Optimizer | None) -> None:
    """Compact states and selections come from the same checkpoint, or cannot be used."""
    if was_compact != (compact is not None):
        raise ValueError(
            f"the optimizer's states in {folder} were saved with compact={was_compact}: resume with the same, or begin "
            "a new run with that folder as the model"
        )
    if compact is not None and not compact.state:
        raise FileNotFoundError(
            f"{folder} holds no optimizer.pt, whose states the saved selection needs: resume from a whole checkpoint, "
            "or begin a new run with that folder as the model"
        )


def _shards(mask: GradientMask, args: TrainingArguments) -> int:
    """Into how many files a selection is split: parameters that are whole on every rank need only one."""
    return args.world_size if any(map(is_sharded, mask.masked_parameters.values())) else 1


def _rank_file(args: TrainingArguments) -> str:
    return f"gradient_mask_rank{args.process_index}_of_{args.world_size}.pt"


def _own_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(state: TrainerState) -> str:
    """Of what all ranks agree on, and ``trainer_state.json`` holds both when it is written and when it is read."""
    losses = [[log["step"], log["loss"]] for log in state.log_history if "loss" in log]
    return hashlib.sha256(json.dumps([state.global_step, state.total_flos, losses]).encode()).hexdigest()
