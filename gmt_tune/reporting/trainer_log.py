"""Reads the log that Hugging Face's Trainer keeps, so that its runs can be drawn as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_STATE_FILE = "trainer_state.json"
_NAMES = {"learning_rate": "lr", "eval_loss": "val_loss"}

_LEFT_OUT = ("epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def read_trainer_log(run_dir: Path) -> list[dict]:
    """Lines of a Trainer's log history as ``{"step": int, **numbers}``; empty where there is none.

    The file lies in the run's folder, or in its checkpoints, of which the one with the most steps counts.
    """
    histories: list[list[dict]] = []
    for path in (run_dir / _STATE_FILE, *run_dir.glob(f"checkpoint-*/{_STATE_FILE}")):
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            histories.append([line for line in history if isinstance(line, dict)])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, or torn by a kill, or foreign
            continue
    return [renamed(line) for line in max(histories, key=_last_step, default=[])]


def renamed(line: Mapping) -> dict:
    """A line of a Trainer's log under the names that a recipe logs."""
    return {_NAMES.get(name, name): value for name, value in line.items() if name not in _LEFT_OUT}


def _last_step(history: list[dict]) -> int:
    return max((step for line in history if isinstance(step := line.get("step"), int)), default=0)
