"""Reads the logs that torchtune's DiskLogger and Hugging Face's Trainer keep, so that their runs can be drawn too."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

_TORCHTUNE_LINE = re.compile(r"^Step (\d{1,15}) \| (.*)$", re.MULTILINE)
_TORCHTUNE_CONFIG = "torchtune_config.yaml"

_TRAINER_STATE = "trainer_state.json"
_TRAINER_NAMES = {"learning_rate": "lr", "eval_loss": "val_loss"}
_TRAINER_ONLY = ("epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def read_torchtune_log(run_dir: Path) -> tuple[list[dict], dict]:
    """What the DiskLogger wrote, in the folder or in one right below: ``log*.txt``, the oldest file first.

    Returns ``{"step": int, name: text}`` for each line, and the config that was saved, empty where unknown.
    """
    found = [*run_dir.glob("log*.txt"), *run_dir.glob("*/log*.txt")]
    logs = sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime)
    lines = [
        dict(field.rpartition(":")[::2] for field in fields.split()) | {"step": int(step)}
        for path in logs
        for step, fields in _TORCHTUNE_LINE.findall(path.read_text(encoding="utf-8", errors="replace"))
    ]
    for folder in (run_dir, *(path.parent for path in logs)):
        if (folder / _TORCHTUNE_CONFIG).is_file():
            from omegaconf import OmegaConf

            try:
                config = OmegaConf.to_container(OmegaConf.load(folder / _TORCHTUNE_CONFIG))
            except Exception:  # a config that was torn or edited by hand costs the summary, not the report
                config = None
            return lines, config if isinstance(config, dict) else {}
    return lines, {}


def read_trainer_log(run_dir: Path) -> list[dict]:
    """Lines of a Trainer's log history as ``{"step": int, name: number}``; empty where there is none.

    The file lies in the run's folder, or in its checkpoints, of which the one with the most steps counts.
    """
    histories: list[list[dict]] = []
    for path in (run_dir / _TRAINER_STATE, *run_dir.glob(f"checkpoint-*/{_TRAINER_STATE}")):
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            histories.append([line for line in history if isinstance(line, dict)])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or torn by a kill, or foreign
            continue
    return [as_recipes_log(line) for line in max(histories, key=_last_step, default=[])]


def as_recipes_log(line: Mapping) -> dict:
    """A line of a Trainer's log under the names that a recipe logs."""
    return {_TRAINER_NAMES.get(name, name): value for name, value in line.items() if name not in _TRAINER_ONLY}


def _last_step(history: list[dict]) -> int:
    return max((step for line in history if isinstance(step := line.get("step"), int)), default=0)
