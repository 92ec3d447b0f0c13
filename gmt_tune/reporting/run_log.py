"""The run log: two small files beside the checkpoints, from which ``gmt-tune report`` draws.

``run_log.jsonl`` holds one JSON object per line: first the run's header, then ``{"step", "time", **numbers}`` for
each call of :meth:`RunLog.log`. ``mask_detail.jsonl`` holds numbers of every masked parameter, at fewer and fewer
steps as the run gets longer. Both are appended to line by line, so that a killed run loses at most its last line.
Standard library only; how they are read is in ``run_reader``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RUN_LOG_FILE = "run_log.jsonl"
MASK_DETAIL_FILE = "mask_detail.jsonl"
FORMAT = "gmt-tune run log"
FORMAT_VERSION = 1

# After the first steps, detail is written when the step has grown by one part in this many.
_DETAIL_RATE = 32

_SECRET_ENDINGS = ("api_key", "password", "secret", "access_token", "hf_token", "auth_token")

log = logging.getLogger(__name__)


class RunLog:
    """Writes a run's numbers to its output folder. Only one rank should have one.

    Call :meth:`truncate_after` once before the first step, with the step that the run starts from.
    A folder that cannot be written to costs the log, not the run: that is warned about once.

    Args:
        output_dir: the run's folder; made if it does not exist.
        config: the run's configuration as plain dicts and lists; goes into the header, passwords and keys blanked.
    """

    def __init__(self, output_dir: str | os.PathLike, config: Mapping | None = None) -> None:
        self._folder = Path(output_dir)
        self._config = _without_secrets(config or {})
        self._last_detail: int | None = None
        self._is_broken = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line.

        Args:
            step: optimizer steps done.
            metrics: name to number (float, int, or anything that ``float`` takes). A name may come again at the
                same step in another call; the last value counts.
        """
        line = {"step": int(step), "time": round(time.time(), 3)}
        self._append(RUN_LOG_FILE, line | {name: _json_number(value) for name, value in metrics.items()})

    def log_mask(
        self, step: int, make_detail: Callable[[], Mapping[str, Mapping[str, float]]]
    ) -> Mapping[str, Mapping[str, float]]:
        """Append the numbers of every masked parameter, where that is due: always at first, later seldom.

        Args:
            step: optimizer steps done.
            make_detail: gives them, as :func:`mask_detail` does; called only where they are due, because
                reading them waits for the device.

        Returns:
            What was written; empty where it was not due.
        """
        if self._last_detail is not None and step - self._last_detail < max(1, step // _DETAIL_RATE):
            return {}
        detail = make_detail()
        if not any(detail.values()):
            return {}
        line: dict = {"step": int(step)}
        for kind, numbers in detail.items():
            line[kind] = {name: _json_number(value, digits=6) for name, value in numbers.items()}
        self._append(MASK_DETAIL_FILE, line)
        self._last_detail = step
        return detail

    def truncate_after(self, step: int) -> None:
        """Start or resume: keep what was logged up to a step, under this run's header; drop what came later.

        Args:
            step: the step that the run goes on from; 0 for a run that starts anew, which drops everything.
        """
        for name in (RUN_LOG_FILE, MASK_DETAIL_FILE):
            path = self._folder / name
            kept = [line for line in read_lines(path) if line.get("step", math.inf) <= step] if step > 0 else []
            if name == MASK_DETAIL_FILE:
                self._last_detail = kept[-1]["step"] if kept else None
            self._guarded(_write_whole, path, [self._header_of(name), *kept])

    def _append(self, name: str, line: dict) -> None:
        path = self._folder / name
        if not path.exists():
            self._guarded(_write_whole, path, [self._header_of(name)])
        self._guarded(_append_line, path, line)

    def _header_of(self, name: str) -> dict:
        header = {"format": FORMAT, "version": FORMAT_VERSION, "file": name, "time": round(time.time(), 3)}
        return {**header, "config": self._config} if name == RUN_LOG_FILE else header

    def _guarded(self, write: Callable, path: Path, content) -> None:
        try:
            write(path, content)
        except OSError as error:
            if not self._is_broken:
                log.warning("The run log %s cannot be written (%s): the run goes on without it.", path, error)
            self._is_broken = True


def mask_detail(mask) -> dict[str, dict[str, float]]:
    """What the last step of a mask did to each parameter.

    Args:
        mask: a ``gmt_tune.GradientMask``, or any object whose ``statistics`` hold ``selected``, ``numel`` and
            ``thresholds`` by name. Reading them waits for the device, and is the same on all ranks.

    Returns:
        ``{"density": {name: fraction that stayed}, "threshold": {name: T}}``.
    """
    statistics = mask.statistics
    selected = _to_numbers(statistics.selected)
    density = {name: count / statistics.numel[name] for name, count in selected.items() if statistics.numel[name]}
    return {"density": density, "threshold": _to_numbers(statistics.thresholds)}


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, one per line; lines that are none (such as a torn last one) are left out.

    What is no file reads as empty. NaN and infinity are the strings that ``float`` takes.
    """
    lines: list[dict] = []
    if not path.is_file():
        return lines
    for raw in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):  # the latter for deep nesting
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _to_numbers(tensors: Mapping[str, Any]) -> dict[str, float]:
    """0-d tensors to numbers, with one transfer per device and dtype rather than one per tensor."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    numbers: dict[str, float] = {}
    for names in groups.values():
        import torch  # there are tensors, so it is loaded already

        numbers.update(zip(names, torch.stack([tensors[name].detach() for name in names]).tolist(), strict=True))
    return {name: numbers[name] for name in tensors}


def _json_number(value, digits: int | None = None) -> float | int | str:
    """A number as strict JSON knows it; NaN and infinity, which it does not know, as strings."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.{digits}g}") if digits else value


def _without_secrets(config):
    if isinstance(config, Mapping):
        return {
            str(key): "***" if value and str(key).lower().endswith(_SECRET_ENDINGS) else _without_secrets(value)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return [_without_secrets(value) for value in config]
    return config


def _dumps(line: dict) -> bytes:
    return (json.dumps(line, separators=(",", ":"), default=str) + "\n").encode()


def _append_line(path: Path, line: dict) -> None:
    """One write to a file opened for appending: a line is there whole, or torn only at the file's end."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # the last writer was killed in mid-line
        os.write(file, (b"\n" if torn else b"") + _dumps(line))
    finally:
        os.close(file)


def _write_whole(path: Path, lines: Iterable[dict]) -> None:
    """Replace a file in one go: a reader, or a run killed meanwhile, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.writelines(_dumps(line) for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
