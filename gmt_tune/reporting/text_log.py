"""Reads what torchtune's DiskLogger writes, so that runs of any torchtune recipe can be drawn."""

from __future__ import annotations

import re
from pathlib import Path

_LINE = re.compile(r"^Step (\d{1,15}) \| (.*)$")
_CONFIG_FILE = "torchtune_config.yaml"


def find_text_logs(run_dir: Path) -> list[Path]:
    """The DiskLogger files of a run folder, oldest first: ``log*.txt`` in it or in a folder right below."""
    found = [*run_dir.glob("log*.txt"), *run_dir.glob("*/log*.txt")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime)


def read_text_logs(paths: list[Path]) -> list[dict]:
    """Lines of DiskLogger files as ``{"step": int, **numbers}``, in order.

    A resumed run writes on, in the same file or in a new one, from a step that may have been logged before: what
    comes later in time takes over from its first step on.
    """
    lines: list[dict] = []
    for path in paths:
        for raw in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            match = _LINE.match(raw)
            if match is None:
                continue
            step = int(match[1])
            while lines and lines[-1]["step"] > step:
                lines.pop()
            lines.append({"step": step, **_numbers(match[2])})
    return lines


def read_saved_config(run_dir: Path, logs: list[Path]) -> dict:
    """The config that torchtune's DiskLogger saves with a run; empty where there is none."""
    for folder in (run_dir, *(path.parent for path in logs)):
        if (folder / _CONFIG_FILE).is_file():
            from omegaconf import OmegaConf

            try:
                config = OmegaConf.to_container(OmegaConf.load(folder / _CONFIG_FILE))
            except Exception:  # a config that was torn or edited by hand costs the summary, not the report
                return {}
            return config if isinstance(config, dict) else {}
    return {}


def _numbers(fields: str) -> dict[str, float]:
    numbers = {}
    for field in fields.split():
        name, _, value = field.rpartition(":")
        try:
            numbers[name] = float(value)
        except ValueError:  # the run was killed in mid-line
            continue
    return numbers
