"""Results on disk: ``docs/results/runs/SUITE.jsonl`` has a line for each run; and what is chosen from them.

Lines are only appended, by any number of processes at once. Of several lines of a run the last one counts; a line cut
short, because its process was killed or the disk was full, counts for nothing.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.quality.experiment import ROOT, Method, Run, Suite, load_method

RESULTS = ROOT / "docs" / "results"
RUNS = RESULTS / "runs"


def suite_file(suite: str) -> Path:
    """Where the results of a suite's runs are."""
    return RUNS / f"{suite}.jsonl"


def read_all(suite: str) -> dict[str, dict]:
    """All results of a suite, by the name of the run."""
    file = suite_file(suite)
    if not file.is_file():
        return {}
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _parsed(file: Path, mtime_ns: int, size: int) -> dict[str, dict]:
    results = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            result = json.loads(line)
            results[result.pop("run")] = result
        except (ValueError, KeyError, AttributeError, TypeError):
            print(f"{file}: line {number} is not a whole result and is left out", file=sys.stderr)
    return results


def read(name: str) -> dict | None:
    """A result, or None if there is none yet."""
    return read_all(name.split("/")[0]).get(name)


def write(name: str, result: dict) -> None:
    """Append a result to its suite's file, on the disk when this returns."""
    file = suite_file(name.split("/")[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"run": name} | _rounded(result), allow_nan=False)
    with open(file, "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        is_cut = stream.read(1) not in (b"", b"\n")  # the line before is of a process that was killed
        stream.write((b"\n" if is_cut else b"") + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def forget(name: str) -> None:
    """Let a run count as not made, until it is made again."""
    write(name, {"key": None})


class Keyed(Protocol):
    """A run of any benchmark: its result's name, and a hash of all that decides the outcome."""

    @property
    def name(self) -> str: ...  # noqa: D102

    def key(self) -> str: ...  # noqa: D102


def read_valid(run: Keyed) -> dict | None:
    """The result of a run, if it was made with the settings that the run has now."""
    result = read(run.name)
    return result if result is not None and result["key"] == run.key() else None


def chosen_learning_rate(suite: Suite, method: Method) -> float | None:
    """The rate with the lowest mean validation loss over the choosing seeds; None while runs are missing."""
    rates = suite.choose["learning_rates"]
    if len(rates) == 1:
        return float(rates[0])
    chooser = method if method.learning_rate_of == method.name else load_method(method.learning_rate_of)
    if missing_choosing_runs(suite, chooser):
        return None
    losses = choosing_losses(suite, chooser)
    return min(losses, key=lambda rate: sum(losses[rate]))


def missing_choosing_runs(suite: Suite, method: Method) -> list[Run]:
    """The runs to make next so that a method's learning rate can be chosen; none once it is."""
    ladder, seeds = [float(rate) for rate in suite.choose["learning_rates"]], suite.choose["seeds"]
    if len(ladder) == 1:
        return []
    found = choosing_losses(suite, method)
    whole = {rate: sum(losses) for rate, losses in found.items() if len(losses) == len(seeds)}
    rates = rates_to_try(ladder, suite.choose.get("start", ladder), whole)
    runs = [run for rate in rates for run in _choosing_runs(suite, method, rate)]
    return [run for run in runs if read_valid(run) is None]


def rates_to_try(ladder: Sequence[float], start: Collection[float], losses: Mapping[float, float]) -> list[float]:
    """Learning rates to try next; none once the best of those tried is inside of them, or all of them diverged.

    Args:
        ladder: all rates, from low to high.
        start: those of them that are tried first.
        losses: of the rates that were tried.
    """
    if missing := [rate for rate in ladder if rate in start and rate not in losses]:
        return missing
    if math.isinf(min(losses.values())):
        return []
    best = ladder.index(min(losses, key=lambda rate: losses[rate]))
    return [ladder[i] for i in (best - 1, best + 1) if 0 <= i < len(ladder) and ladder[i] not in losses]


def _choosing_runs(suite: Suite, method: Method, rate: float) -> list[Run]:
    """At one rate; a seed that is measured anyway chooses by its measured run."""
    phases = {seed: "measure" if seed in suite.seeds else "choose" for seed in suite.choose["seeds"]}
    return [Run(suite, method, rate, seed, phase) for seed, phase in phases.items()]


def choosing_losses(suite: Suite, method: Method) -> dict[float, list[float]]:
    """Validation losses by learning rate, of the choosing runs that there are; infinite for a run that diverged."""
    losses: dict[float, list[float]] = {}
    for rate in suite.choose["learning_rates"]:
        for run in _choosing_runs(suite, method, float(rate)):
            result = read_valid(run)
            if result is not None:
                loss = math.inf if result["failed"] else result["losses"]["validation"]
                losses.setdefault(float(rate), []).append(loss)
    return losses


def measured(suite: Suite, method: Method) -> dict[int, dict]:
    """Results by seed, of the measured runs at the chosen learning rate."""
    rate = chosen_learning_rate(suite, method)
    if rate is None:
        return {}
    return _measured_at(suite, method, rate)


def measured_at_other_rates(suite: Suite, method: Method) -> dict[float, dict[int, dict]]:
    """Results by learning rate and seed, of the measured runs at rates that were not chosen."""
    start = f"{suite.name}/{method.name}/measure_lr"
    rates = {float(name.removeprefix(start).split("_")[0]) for name in read_all(suite.name) if name.startswith(start)}
    others = sorted(rates - {chosen_learning_rate(suite, method)})
    return {rate: runs for rate in others if (runs := _measured_at(suite, method, rate))}


def _measured_at(suite: Suite, method: Method, rate: float) -> dict[int, dict]:
    runs = {seed: read_valid(Run(suite, method, rate, seed, "measure")) for seed in suite.seeds}
    return {seed: result for seed, result in runs.items() if result is not None}


def _rounded(value):
    """Six significant digits: enough for every table, and short files. What is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
