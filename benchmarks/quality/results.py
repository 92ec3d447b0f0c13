"""Results on disk: one JSON file per run below ``docs/results/runs``, and what is chosen from them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from benchmarks.quality.experiment import ROOT, Method, Run, Suite, load_method

RESULTS = ROOT / "docs" / "results"
RUNS = RESULTS / "runs"


def result_file(name: str) -> Path:
    """Where the result of a run of that name is."""
    return RUNS / f"{name}.json"


def read(name: str) -> dict | None:
    """A result, or None if there is none yet."""
    file = result_file(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write(name: str, result: dict) -> None:
    """Write a result in one go."""
    file = result_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(_rounded(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(file)


def read_valid(run: Run) -> dict | None:
    """The result of a run, if it was made with the settings that the run has now."""
    result = read(run.name)
    return result if result is not None and result["key"] == run.key() else None


def chosen_learning_rate(suite: Suite, method: Method) -> float | None:
    """The rate with the lowest mean validation loss over the choosing seeds; None while runs are missing.

    A run that ended with a loss that is not finite counts as infinitely bad.
    """
    chooser = method if method.learning_rate_of == method.name else load_method(method.learning_rate_of)
    if len(suite.choose["learning_rates"]) == 1:
        return float(suite.choose["learning_rates"][0])
    means = {}
    for rate in suite.choose["learning_rates"]:
        losses = []
        for seed in suite.choose["seeds"]:
            result = read_valid(Run(suite, chooser, float(rate), seed, "choose"))
            if result is None:
                return None
            losses.append(math.inf if result["failed"] else result["losses"]["validation"])
        means[float(rate)] = sum(losses) / len(losses)
    return min(means, key=means.get)


def choosing_losses(suite: Suite, method: Method) -> dict[float, list[float]]:
    """Validation losses by learning rate, of the choosing runs that there are."""
    losses: dict[float, list[float]] = {}
    for rate in suite.choose["learning_rates"]:
        for seed in suite.choose["seeds"]:
            result = read_valid(Run(suite, method, float(rate), seed, "choose"))
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
    rates = {
        float(file.name.split("_")[1].removeprefix("lr"))
        for file in (RUNS / suite.name / method.name).glob("measure_*")
    }
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
