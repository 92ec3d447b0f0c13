"""A report's first tables: what each run was, and how it went."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from gmt_tune.reporting.drawing import Table
from gmt_tune.reporting.mask_metrics import is_group_metric
from gmt_tune.reporting.run_reader import Run

_AT = "{value} (step\u00a0{step})"


def summary_tables(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """Captioned tables: one row per fact that any of the runs knows, one column per run."""
    header = ["", *(run.name for run in runs)] if len(runs) > 1 else []
    set_up = [[label, *values] for label, fact in _SET_UP if any(values := [fact(run) for run in runs])]
    outcome = [[label, *values] for label, fact in _OUTCOME if any(values := [fact(run) for run in runs])]
    outcome += _logged_once(runs)
    return [(title, Table(header, rows)) for title, rows in (("Set-up", set_up), ("Outcome", outcome)) if rows]


def _logged_once(runs: Sequence[Run]) -> list[list[str]]:
    """Numbers that no curve shows, such as those of an evaluation after the run."""
    names = {name: None for run in runs for name in run.series}
    return [
        [name, *(_number(run.series[name].last) if run.has(name) else "" for run in runs)]
        for name in names
        if not _has_a_place(name) and all(len(run.series[name].steps) == 1 for run in runs if run.has(name))
    ]


def _has_a_place(name: str) -> bool:
    return name.startswith(("mask/", "peak_memory_")) or name in _METRICS_WITH_A_PLACE or is_group_metric(name)


def _config(*path: str) -> Callable[[Run], str]:
    """A config value by its path; dotted components are named by their last part."""

    def fact(run: Run) -> str:
        value: object = run.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return ""
        if path[-1] == "_component_":
            return str(value).rpartition(".")[2]
        if isinstance(value, list):
            return ", ".join(map(str, value)) or ""
        return str(value)

    return fact


def _mask(key: str) -> Callable[[Run], str]:
    return _config("gradient_mask", key)


def _refresh(run: Run) -> str:
    mask = run.config.get("gradient_mask")
    if isinstance(mask, dict) and "refresh_every" in mask and mask["refresh_every"] is None:
        return "selected once"
    return _mask("refresh_every")(run)


def _is_masked(run: Run) -> str:
    if isinstance(run.config.get("gradient_mask"), dict):
        return ""
    if any(name.startswith("mask/") for name in run.series):
        return ""
    return "none: every entry is updated" if run.config else ""


def _dataset(run: Run) -> str:
    source = _config("dataset", "source")(run)
    if source in ("json", "csv", "parquet", "text"):
        source = _config("dataset", "data_files")(run) or source
    return source or _config("dataset", "_component_")(run)


def _rows_per_step(run: Run) -> str:
    batch, accumulated = run.config.get("batch_size"), run.config.get("gradient_accumulation_steps", 1)
    return f"{batch} × {accumulated}" if batch else ""


def _optimizer(run: Run) -> str:
    name, lr = _config("optimizer", "_component_")(run), _config("optimizer", "lr")(run)
    return f"{name}, lr {lr}" if name and lr else name


def _steps(run: Run) -> str:
    return str(max(series.steps[-1] for series in run.series.values())) if run.series else ""


def _first(metric: str) -> Callable[[Run], str]:
    def fact(run: Run) -> str:
        series = run.series.get(metric)
        return _AT.format(value=_number(series.values[0]), step=series.steps[0]) if series else ""

    return fact


def _last(metric: str) -> Callable[[Run], str]:
    def fact(run: Run) -> str:
        series = run.series.get(metric)
        return _AT.format(value=_number(series.last), step=series.steps[-1]) if series else ""

    return fact


def _lowest(metric: str) -> Callable[[Run], str]:
    def fact(run: Run) -> str:
        series = run.series.get(metric)
        if series is None or not series.finite:
            return ""
        value, step = min((v, s) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v))
        return _AT.format(value=_number(value), step=step)

    return fact


def _mean_of_last_tenth(run: Run) -> str:
    series = run.series.get("loss")
    if series is None or len(series.values) < 20:
        return ""
    tenth = series.values[-(len(series.values) // 10) :]
    return _number(sum(tenth) / len(tenth))


def _median(metric: str, unit: str = "") -> Callable[[Run], str]:
    def fact(run: Run) -> str:
        finite = run.series[metric].finite if run.has(metric) else []
        return f"{_number(statistics.median(finite))}{unit}" if finite else ""

    return fact


def _highest(metric: str, unit: str) -> Callable[[Run], str]:
    def fact(run: Run) -> str:
        finite = run.series[metric].finite if run.has(metric) else []
        return f"{_number(max(finite))}{unit}" if finite else ""

    return fact


def _not_finite(run: Run) -> str:
    series = run.series.get("loss")
    if series is None:
        return ""
    count = len(series.values) - len(series.finite)
    return f"{count} of {len(series.values)} logged" if count else ""


def _duration(run: Run) -> str:
    """From the first to the last logged line; pauses between interrupted runs count too.

    The time by which a clock was set back is left out.
    """
    if len(run.times.values) < 2:
        return ""
    seconds = round(sum(max(0.0, after - before) for before, after in itertools.pairwise(run.times.values)))
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _number(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:.4g}"


_METRICS_WITH_A_PLACE = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second_per_gpu", "skipped_steps")

_Facts = tuple[tuple[str, Callable[[Run], str]], ...]
_SET_UP: _Facts = (
    ("model", _config("model", "_component_")),
    ("started from", _config("checkpointer", "checkpoint_dir")),
    ("data", _dataset),
    ("mask", _is_masked),
    ("density", _mask("density")),
    ("score", _mask("score")),
    ("scope", _mask("scope")),
    ("refresh every", _refresh),
    ("dense", _mask("dense")),
    ("frozen", _mask("frozen")),
    ("optimizer", _optimizer),
    ("batch × accumulation", _rows_per_step),
    ("dtype", _config("dtype")),
    ("seed", _config("seed")),
)
_OUTCOME: _Facts = (
    ("steps", _steps),
    ("first loss", _first("loss")),
    ("last loss", _last("loss")),
    ("mean loss of the last tenth", _mean_of_last_tenth),
    ("losses that are not finite", _not_finite),
    ("lowest validation loss", _lowest("val_loss")),
    ("last validation loss", _last("val_loss")),
    ("measured density, median", _median("mask/density")),
    ("coverage at the end", _last("mask/coverage")),
    ("tokens per second and device, median", _median("tokens_per_second_per_gpu")),
    ("mask, median per step", _median("mask/seconds", " s")),
    ("peak memory", _highest("peak_memory_reserved", " GiB")),
    ("time logged", _duration),
)
