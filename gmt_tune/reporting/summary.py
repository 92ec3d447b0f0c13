"""A report's first tables: what each run was, and how it went."""

import itertools
import statistics
from collections.abc import Callable, Sequence

from gmt_tune.reporting.drawing import Table, short_number
from gmt_tune.reporting.mask_metrics import is_group_metric
from gmt_tune.reporting.run_reader import Run, Series

# Metrics that a figure or a row of its own shows
_PLACED = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second_per_gpu", "skipped_steps")


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
        [name, *(short_number(run.series[name].last) if run.has(name) else "" for run in runs)]
        for name in names
        if not (name in _PLACED or name.startswith(("mask/", "peak_memory_")) or is_group_metric(name))
        and all(len(run.series[name].steps) == 1 for run in runs if run.has(name))
    ]


def _config(*path: str) -> Callable[[Run], str]:
    """A config value by its path; dotted components are named by their last part."""

    def fact(run: Run) -> str:
        value: object = run.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return ""
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return str(value).rpartition(".")[2] if path[-1] == "_component_" else str(value)

    return fact


def _refresh(run: Run) -> str:
    mask = run.config.get("gradient_mask")
    if isinstance(mask, dict) and mask.get("refresh_every", 1) is None:
        return "selected once"
    return _config("gradient_mask", "refresh_every")(run)


def _resumed_from(run: Run) -> str:
    folder = _config("checkpointer", "checkpoint_dir")(run)
    return folder if run.base not in (None, folder) else ""


def _is_masked(run: Run) -> str:
    is_masked = isinstance(run.config.get("gradient_mask"), dict)
    if is_masked or not run.config or any(name.startswith("mask/") for name in run.series):
        return ""
    return "none: every entry is updated"


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


def _of(metric: str, describe: Callable[[Series], str]) -> Callable[[Run], str]:
    """What a function says of a metric; nothing where the metric was not logged."""
    return lambda run: describe(run.series[metric]) if run.has(metric) else ""


def _at(index: int) -> Callable[[Series], str]:
    return lambda series: f"{short_number(series.values[index])} (step\u00a0{series.steps[index]})"


def _lowest(series: Series) -> str:
    return _at(series.values.index(min(series.finite)))(series) if series.finite else ""


def _over_run(reduce: Callable[[list[float]], float], unit: str = "") -> Callable[[Series], str]:
    return lambda series: f"{short_number(reduce(series.finite))}{unit}" if series.finite else ""


def _mean_of_last_tenth(series: Series) -> str:
    if len(series.values) < 20:
        return ""
    tenth = series.values[-(len(series.values) // 10) :]
    return short_number(sum(tenth) / len(tenth))


def _not_finite(series: Series) -> str:
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


_Facts = tuple[tuple[str, Callable[[Run], str]], ...]
_SET_UP: _Facts = (
    ("model", _config("model", "_component_")),
    ("started from", lambda run: run.base or _config("checkpointer", "checkpoint_dir")(run)),
    ("resumed from", _resumed_from),
    ("data", _dataset),
    ("mask", _is_masked),
    ("density", _config("gradient_mask", "density")),
    ("score", _config("gradient_mask", "score")),
    ("scope", _config("gradient_mask", "scope")),
    ("refresh every", _refresh),
    ("dense", _config("gradient_mask", "dense")),
    ("frozen", _config("gradient_mask", "frozen")),
    ("optimizer", _optimizer),
    ("batch × accumulation", _rows_per_step),
    ("dtype", _config("dtype")),
    ("seed", _config("seed")),
)
_OUTCOME: _Facts = (
    ("steps", _steps),
    ("first loss", _of("loss", _at(0))),
    ("last loss", _of("loss", _at(-1))),
    ("mean loss of the last tenth", _of("loss", _mean_of_last_tenth)),
    ("losses that are not finite", _of("loss", _not_finite)),
    ("lowest validation loss", _of("val_loss", _lowest)),
    ("last validation loss", _of("val_loss", _at(-1))),
    ("measured density, median", _of("mask/density", _over_run(statistics.median))),
    ("coverage at the end", _of("mask/coverage", _at(-1))),
    ("tokens per second and device, median", _of("tokens_per_second_per_gpu", _over_run(statistics.median))),
    ("mask, median per step", _of("mask/seconds", _over_run(statistics.median, " s"))),
    ("peak memory", _of("peak_memory_reserved", _over_run(max, " GiB"))),
    ("time logged", _duration),
)
