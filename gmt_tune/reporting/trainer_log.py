"""Reads the log that Hugging Face's Trainer keeps, so that its runs can be drawn as well."""

from __future__ import annotations

import json
from pathlib import Path

_STATE_FILE = "trainer_state.json"
_NAMES = {"learning_rate": "lr", "eval_loss": "val_loss"}


def read_trainer_log(run_dir: Path) -> list[dict]:
    """Lines of a Trainer's log history as ``{"step": int, **numbers}``; empty where there is none.

    The file lies in the run's folder, or in its checkpoints, of which the one with the most steps counts.
    """
    histories = []
    for path in (run_dir / _STATE_FILE, *run_dir.glob(f"checkpoint-*/{_STATE_FILE}")):
        try:
            histories.append(json.loads(path.read_text(encoding="utf-8"))["log_history"])
        except (OSError, ValueError, KeyError, TypeError):  # not there, or torn when the run was killed
            continue
    history = max(histories, key=_last_step, default=[])
    return [
        {_NAMES.get(name, name): value for name, value in line.items() if name != "epoch"}
        for line in history
        if isinstance(line, dict)
    ]


def _last_step(history) -> int:
    return max((line.get("step", 0) for line in history if isinstance(line, dict)), default=0)
