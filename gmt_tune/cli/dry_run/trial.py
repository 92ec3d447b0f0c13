"""The trial: a few steps of the config's recipe on the small model, saved, and gone on with from what was saved."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune.config._utils import _get_component_from_path

from gmt_tune.cli.dry_run.tiny_model import write_tiny_model
from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.checkpoint.manifest import read_checkpoint

_HERE = "gmt_tune.cli.dry_run"
EPOCHS = 2
STEPS_OF_AN_EPOCH = 2
ROWS_HELD_OUT = 8
BATCH = 2

# Logits that a step may hold, in entries: about half a second of one core.
_LOGITS = 1 << 26
_LONGEST = 1024

# The command `tune`. torchao's optimizers would compile an update for each shape of a tensor, for 20 seconds each.
_TUNE = "import torch; torch.compiler.set_stance('force_eager'); from torchtune._cli.tune import main; main()"


@dataclass(frozen=True)
class Trial:
    """What came out of it.

    Attributes:
        steps: optimizer steps done.
        batch_size, max_seq_len: of the small run; the latter None where the tokenizer has none.
        losses: of these steps.
        val_loss: at the end, or None.
        evaluation: its numbers at the end, by name.
        model_files: of the last checkpoint.
        is_same: whether the weights of the run that was gone on with are those of the other, bit for bit.
    """

    steps: int
    batch_size: int
    max_seq_len: int | None
    losses: list[float]
    val_loss: float | None
    evaluation: dict[str, float]
    model_files: list[str]
    is_same: bool


def try_out(cfg: DictConfig, recipe: str, folder: Path, vocab_size: int, median_tokens: int) -> Trial:
    """Train, save, and go on, in processes of their own, as ``tune run`` starts them.

    Args:
        cfg: that the check of ``tune run`` has passed.
        recipe: its name.
        folder: exists, is empty, and is the caller's to delete.
        vocab_size: of the model.
        median_tokens: of a row.

    Raises:
        UserError: with the sentence that the recipe ends with.
    """
    model_folder = folder / "model"
    model_folder.mkdir()
    small = small_config(cfg, folder, write_tiny_model(cfg, model_folder), vocab_size, median_tokens)
    file, output_dir = folder / "config.yaml", Path(small.output_dir)
    file.touch(mode=0o600)  # it has what the config takes from the environment
    OmegaConf.save(small, file)
    _run(recipe, file, output_dir)
    last = output_dir / f"epoch_{EPOCHS - 1}"
    uninterrupted = _weights_of(last)
    losses = _logged(output_dir)
    shutil.rmtree(last)
    _run(recipe, file, output_dir, "resume_from_checkpoint=True")
    again = _weights_of(last)
    numbers = losses[-1]
    return Trial(
        steps=int(numbers["step"]),
        batch_size=small.batch_size,
        max_seq_len=small.tokenizer.get("max_seq_len", None),
        losses=[line["loss"] for line in losses if "loss" in line],
        val_loss=next((line["val_loss"] for line in losses if "val_loss" in line), None),
        evaluation={key: value for line in losses for key, value in line.items() if key.endswith("_after")},
        model_files=sorted(uninterrupted),
        is_same=again == uninterrupted,
    )


def small_config(
    cfg: DictConfig, folder: Path, weights: Mapping[str, Any], vocab_size: int, median_tokens: int
) -> DictConfig:
    """The same config for a few steps of the small model on the CPU, writing to a folder that is nobody's."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    output_dir = str(folder / "out")
    plain["model"] = {"_component_": f"{_HERE}.tiny_model.tiny_model", "of": plain["model"]}
    for section in ("checkpointer", "ref_checkpointer"):
        if plain.get(section) is not None:
            plain[section] |= {**weights, "output_dir": f"{folder / section}"}
    plain["checkpointer"]["output_dir"] = output_dir
    batch = min(BATCH, plain["batch_size"])
    if plain["tokenizer"].get("max_seq_len") is not None:
        fits = max(_LOGITS // vocab_size // batch, median_tokens, 64)
        plain["tokenizer"]["max_seq_len"] = min(plain["tokenizer"]["max_seq_len"], fits, _LONGEST)
    plain["dataset"] = _first_rows(plain["dataset"], None)
    if plain.get("dataset_val") is not None:
        plain["dataset_val"] = _first_rows(plain["dataset_val"], ROWS_HELD_OUT)
    if plain.get("evaluation") is not None:
        takes = inspect.signature(_get_component_from_path(plain["evaluation"]["_component_"])).parameters
        if "size" in takes:
            plain["evaluation"]["size"] = min(plain["evaluation"].get("size") or ROWS_HELD_OUT, ROWS_HELD_OUT)
    if plain.get("lr_scheduler") is not None and "num_warmup_steps" in plain["lr_scheduler"]:
        plain["lr_scheduler"]["num_warmup_steps"] = 1  # so that steps change weights
    if plain.get("seed") is None:
        plain["seed"] = 0
    changed = {
        "output_dir": output_dir,
        "device": "cpu",
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(folder / "logs"),
        },
        "batch_size": batch,
        "batch_size_val": None,
        "gradient_accumulation_steps": 1,
        "epochs": EPOCHS,
        "max_steps_per_epoch": STEPS_OF_AN_EPOCH,
        "save_every_n_steps": None,
        "keep_last_n_checkpoints": None,
        "resume_from_checkpoint": False,
        "run_val_every_n_steps": None,
        "tensor_parallel_dim": 1,
        "fsdp_cpu_offload": False,
        "enable_activation_offloading": False,
        "compile": False,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "write_report": False,
        "profiler": None,
    }
    return OmegaConf.create(plain | {key: value for key, value in changed.items() if key in plain or value is not None})


def _first_rows(section: Any, rows: int | None) -> Any:
    """The section, or each of a list, with no more rows than those; of packed ones, a few packs."""
    if isinstance(section, list):
        return [_first_rows(part, rows) for part in section]
    if rows is None and not section.get("packed", False):
        return section
    packed = section.get("packed", False)
    return {"_component_": f"{_HERE}.inputs.first_rows", "of": section, "rows": rows, "packed": packed}


def _run(recipe: str, file: Path, output_dir: Path, *overrides: str) -> None:
    """As ``tune run``; raise UserError with what it says if it fails."""
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", _TUNE, "run", recipe, "--config", str(file), *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
    if ended.returncode == 0:
        return
    said = re.findall(r"^Error: (.*)", ended.stderr, re.MULTILINE)
    for traceback in sorted(output_dir.glob("error_of_rank*.txt")):
        said[-1:] = [re.sub(r" \(its traceback is in [^)]*\)", "", line) for line in said[-1:]]
        print(traceback.read_text(), file=sys.stderr)
    lines = (ended.stderr or ended.stdout).strip().splitlines()
    sentence = said[-1] if said else one_line(Exception(lines[-1] if lines else f"it ended with {ended.returncode}"))
    if os.environ.get("GMT_TUNE_DEBUG") == "1":
        print(ended.stderr, file=sys.stderr)
    raise UserError(f"the dry run ended: {sentence}")


def _weights_of(folder: Path) -> dict[str, list[int]]:
    """Size and checksum of the files with the weights of a whole checkpoint, by name."""
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"the dry run ended without the checkpoint {folder.name}: report this as a bug")
    return {name: checkpoint.files[name] for name in checkpoint.progress.model_files}


def _logged(output_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output_dir / "run_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]
