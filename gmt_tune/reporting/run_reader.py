"""Reads a run's folder back: its run log, or where there is none, the log of torchtune or of the HF Trainer."""

import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gmt_tune.errors import UserError
from gmt_tune.reporting.foreign_logs import read_torchtune_log, read_trainer_log
from gmt_tune.reporting.parameter_names import distinct_endings
from gmt_tune.reporting.redaction import without_secrets
from gmt_tune.reporting.run_log import FORMAT, FORMAT_VERSION, MASK_DETAIL_FILE, RUN_LOG_FILE, base_in, read_lines

log = logging.getLogger(__name__)

__all__ = ["Run", "Series", "read_run", "read_runs"]

# Numbers and steps beyond these cannot be drawn. Nor can such characters, of which a name has no use.
_LARGEST, _LARGEST_STEP = 1e300, 2**53
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


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
        """The values that are neither NaN nor infinite."""
        return [value for value in self.values if math.isfinite(value)]


@dataclass
class Run:
    """What a run left behind.

    Attributes:
        path: its folder.
        name: the folder's, or as much of its path as sets it apart from other runs.
        config: as the run's header holds it; empty where unknown.
        base: the model that it began from.
        series: by metric.
        times: unix seconds of logged steps, where known.
        details: kind ("density", "threshold", "overlap", "coverage") to a list of (step, {parameter: value}).
    """

    path: Path
    name: str
    config: dict = field(default_factory=dict)
    base: str | None = None
    series: dict[str, Series] = field(default_factory=dict)
    times: Series = field(default_factory=Series)
    details: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)

    def has(self, metric: str) -> bool:
        """Whether a metric was logged."""
        return metric in self.series


def read_run(run_dir: str | Path) -> Run:
    """Read a run's folder.

    Args:
        run_dir: it has ``run_log.jsonl``; or torchtune's ``log*.txt`` in it or in a folder right below; or a Trainer's
            ``trainer_state.json`` in it or in a checkpoint.

    Raises:
        UserError: if there is no such folder, no log with a step in it, or one that cannot be read.
    """
    path = Path(os.path.expanduser(run_dir))
    if not os.path.isdir(path):
        raise UserError(f"{path} is no folder: name the output_dir of a run")
    try:
        return _read_folder(path)
    except OSError as error:
        file = error.filename or path
        raise UserError(f"{file} cannot be read ({error.strerror or error}): check its permissions") from None


def _read_folder(path: Path) -> Run:
    run = Run(path=path, name=_text(path.resolve().name))
    lines = read_lines(path / RUN_LOG_FILE)
    header = next((line for line in lines if line.get("format") == FORMAT), {})
    version = header.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path / RUN_LOG_FILE} has format version {version}, newer than this gmt-tune knows ({FORMAT_VERSION}): "
            "upgrade gmt-tune"
        )
    if isinstance(header.get("config"), dict):
        run.config = header["config"]
        run.base = base_in(header)
    steps = _in_order(lines)
    if not steps:
        lines, saved_config = read_torchtune_log(path)
        steps = _in_order(lines) or _in_order(read_trainer_log(path))
        run.config = run.config or saved_config
    run.config = without_secrets(run.config)  # of other programs, which write them into their logs
    if not steps:
        raise UserError(
            f"{path} holds no logged step in {RUN_LOG_FILE}, torchtune's log*.txt or a Trainer's trainer_state.json: "
            "name the output_dir of a run that has logged at least once"
        )
    for line in steps:
        step, numbers = line.pop("step"), _numbers(line)
        time = numbers.pop("time", math.nan)
        if math.isfinite(time):
            run.times.add(step, time)
        for name, number in numbers.items():
            run.series.setdefault(name, Series()).add(step, number)
    for line in _in_order(read_lines(path / MASK_DETAIL_FILE)):
        for kind, numbers in line.items():
            if isinstance(numbers, dict):
                rows = run.details.setdefault(kind, [])
                if rows and rows[-1][0] == line["step"]:
                    rows.pop()
                rows.append((line["step"], _numbers(numbers)))
    return run


def read_runs(run_dirs: Iterable[str | Path]) -> list[Run]:
    """Read several runs and give each a name of its own: as many trailing parts of its path as it takes.

    Args:
        run_dirs: their folders, as :func:`read_run` takes them.

    Raises:
        UserError: if none can be read; of several, those that cannot are left out with a warning.
    """
    runs: list[Run] = []
    errors: list[UserError] = []
    for run_dir in run_dirs:
        try:
            runs.append(read_run(run_dir))
        except UserError as error:
            errors.append(error)
    if not runs and errors:
        raise errors[0]
    for error in errors:
        log.warning("Left out of the report: %s", error)
    parts = [run.path.resolve().parts for run in runs]
    for i, (run, ending) in enumerate(zip(runs, distinct_endings(parts), strict=True)):
        earlier = parts[:i].count(parts[i])
        run.name = _text("/".join(ending)) + (f" ({earlier + 1})" if earlier else "")
    return runs


def _in_order(lines: list[dict]) -> list[dict]:
    """Lines with a step; a step lower than those before it takes over, as a resumed run does."""
    kept: list[dict] = []
    for line in lines:
        step = line.get("step")
        if type(step) is not int or not 0 <= step <= _LARGEST_STEP:
            continue
        while kept and kept[-1]["step"] > step:
            kept.pop()
        kept.append(line)
    return kept


def _numbers(line: dict) -> dict[str, float]:
    """The values of a line that are numbers, or text that ``float`` takes."""
    numbers = {}
    for name, value in line.items():
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf if value > 0 else -math.inf
        except (TypeError, ValueError):
            continue
        numbers[_text(name)] = math.copysign(math.inf, number) if abs(number) > _LARGEST else number
    return numbers


def _text(name: str) -> str:
    return _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", name)
