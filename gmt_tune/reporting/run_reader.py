"""Reads a run's folder back: its run log, or where there is none, the log of torchtune or of the HF Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gmt_tune.errors import UserError
from gmt_tune.reporting.redaction import without_secrets
from gmt_tune.reporting.run_log import FORMAT, FORMAT_VERSION, MASK_DETAIL_FILE, RUN_LOG_FILE, read_lines
from gmt_tune.reporting.text_log import find_text_logs, read_saved_config, read_text_logs
from gmt_tune.reporting.trainer_log import read_trainer_log


@dataclass
class Series:
    """One metric over a run: steps rise strictly, values may be NaN or infinite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append a value; at a step that is there already, it takes the place of the earlier one."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
        else:
            self.steps.append(step)
            self.values.append(value)

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        path: its folder.
        name: what to call it.
        config: as the run's header holds it; empty where unknown.
        series: metric name to its values over the steps.
        times: unix seconds of logged steps, where known.
        details: numbers per parameter: kind ("density", "threshold", "overlap", "coverage") to a list of
            (step, {parameter: value}).
    """

    path: Path
    name: str
    config: dict = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    times: Series = field(default_factory=Series)
    details: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)

    def has(self, metric: str) -> bool:
        """Whether a metric was logged."""
        return metric in self.series


def read_run(run_dir: str | Path) -> Run:
    """Read a run's folder.

    Args:
        run_dir: an output folder with ``run_log.jsonl``; or with torchtune's ``log*.txt`` in it or in a folder
            right below; or with a Trainer's ``trainer_state.json`` in it or in a checkpoint.

    Raises:
        UserError: if there is no such folder, or no log with a step in it.
    """
    path = Path(run_dir).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} is no folder: name the output_dir of a run")
    run = Run(path=path, name=path.resolve().name)
    lines = read_lines(path / RUN_LOG_FILE)
    header = next((line for line in lines if line.get("format") == FORMAT), {})
    if isinstance(header.get("version"), int) and header["version"] > FORMAT_VERSION:
        raise UserError(
            f"{path / RUN_LOG_FILE} has format version {header['version']}, newer than this gmt-tune knows "
            f"({FORMAT_VERSION}): upgrade gmt-tune"
        )
    if isinstance(header.get("config"), dict):
        run.config = header["config"]
    steps = _in_order(lines)
    if not steps:
        logs = find_text_logs(path)
        steps = read_text_logs(logs)
        run.config = run.config or read_saved_config(path, logs)
    steps = steps or _in_order(read_trainer_log(path))
    run.config = without_secrets(run.config)  # of other programs, which write them into their logs
    if not steps:
        raise UserError(
            f"{path} holds no logged step in {RUN_LOG_FILE}, torchtune's log*.txt or a Trainer's trainer_state.json: "
            "name the output_dir of a run that has logged at least once"
        )
    for line in steps:
        for name, value in line.items():
            number = _number(value)
            if name == "time":
                run.times.add(line["step"], number)
            elif name != "step" and number is not None:
                run.series.setdefault(name, Series()).add(line["step"], number)
    for line in _in_order(read_lines(path / MASK_DETAIL_FILE)):
        for kind, numbers in line.items():
            if isinstance(numbers, dict):
                values = {name: number for name, value in numbers.items() if (number := _number(value)) is not None}
                run.details.setdefault(kind, []).append((line["step"], values))
    return run


def read_runs(run_dirs: Iterable[str | Path]) -> list[Run]:
    """Read several runs and give each a name of its own: as many trailing parts of its path as it takes."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    parts = [run.path.resolve().parts for run in runs]
    for i, (run, own) in enumerate(zip(runs, parts, strict=True)):
        for length in range(1, len(own) + 1):
            if len({other for other in parts if other[-length:] == own[-length:]}) == 1:
                break
        again = parts[:i].count(own)
        run.name = "/".join(own[-length:]) + (f" ({again + 1})" if again else "")
    return runs


def _in_order(lines: list[dict]) -> list[dict]:
    """Lines with a step; a step lower than those before it takes over, as a resumed run does."""
    kept: list[dict] = []
    for line in lines:
        if not isinstance(line.get("step"), int):
            continue
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return kept


def _number(value) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
