"""The figures of a report: which metric is drawn how, for one run or several on the same axes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from gmt_tune.reporting.drawing import Figure, Table, short_number
from gmt_tune.reporting.mask_metrics import is_group_metric
from gmt_tune.reporting.parameter_names import Grid, to_grid
from gmt_tune.reporting.plots import MAX_POINTS, Curve, draw_curves, draw_grid, grid_height, legend_height, shorten
from gmt_tune.reporting.run_reader import Run, Series

# Metric, title, note. Drawn in this order, where logged; the loss comes before, pictures by layer after them.
_CURVES = (
    ("lr", "Learning rate", "Of the step that was just done."),
    (
        "grad_norm",
        "Gradient norm",
        "L2 norm of the gradient before clipping: of the whole one before the mask, or, with CompactAdamW, of what is "
        "selected and dense.",
    ),
    (
        "mask/density",
        "Density",
        "Fraction of the masked tensors' entries that stayed. Above the configured density where many entries tie "
        "at the threshold, below it where many gradients are zero.",
    ),
    ("mask/overlap", "Overlap", "Fraction of a selection that is selected again at the next tracked step."),
    ("mask/coverage", "Coverage", "Fraction of the masked tensors' entries that were selected at least once."),
    ("mask/age", "Age", "Optimizer steps for which selected entries have been selected without a break: their mean."),
    ("tokens_per_second_per_gpu", "Throughput", "Trained tokens per second and device."),
    ("mask/seconds", "Time of the mask", "Seconds per optimizer step, as the host sees them."),
    ("skipped_steps", "Steps left out", "Steps whose loss or gradient was not finite, counted."),
)
_MEMORY = ("peak_memory_reserved", "peak_memory_alloc", "peak_memory_active")
_LOSSES = {"loss": "training", "val_loss": "validation"}
_THRESHOLDS = ("mask/threshold_min", "mask/threshold_median", "mask/threshold_max")


def build_figures(runs: Sequence[Run]) -> tuple[list[Figure], list[Figure]]:
    """All figures that these runs have numbers for, in the order of the page: over the run, and by layer."""
    memory = next((metric for metric in _MEMORY if any(run.has(metric) for run in runs)), _MEMORY[0])
    what = memory.removeprefix("peak_memory_").replace("alloc", "allocated")
    over_time = (
        _loss(runs),
        *(_of_metric(runs, metric, title, note) for metric, title, note in _CURVES),
        _threshold_over_time(runs),
        _of_metric(runs, memory, "Peak memory", f"GiB {what} on a device, the most so far."),
        *(_of_metric(runs, name, name, "As logged.") for name in _other_names(runs)),
    )
    by_layer = (
        *_thresholds_by_depth(runs),
        *_heat_maps(runs, "density", "Density by layer and module", "Fraction that stayed", mean=True),
        *_heat_maps(runs, "coverage", "Coverage by layer and module", "Fraction selected at least once"),
        *_heat_maps(runs, "overlap", "Overlap by layer and module", "Fraction selected again", mean=True),
    )
    keys: set[str] = set()
    first, second = (
        [_with_unique_key(figure, keys) for figure in figures if figure is not None]
        for figures in (over_time, by_layer)
    )
    return first, second


def _with_unique_key(figure: Figure, keys: set[str]) -> Figure:
    """Keys are ids in the page and names of files, and made from names that may differ in signs alone."""
    key = figure.key[:80] or "metric"
    if key in keys:
        key = f"{key}-figure-{len(keys)}"
    keys.add(key)
    return replace(figure, key=key)


def _loss(runs: Sequence[Run]) -> Figure | None:
    curves, sentences = [], []
    for i, run in enumerate(runs):
        for metric, kind in _LOSSES.items():
            if run.has(metric):
                label = kind if len(runs) == 1 else f"{shorten(run.name)}, {kind}"
                # A single run's two losses differ in colour too
                index = i if len(runs) > 1 or metric == "loss" else 1
                series = run.series[metric]
                curves.append(Curve(label, series.steps, series.values, index, dashed=metric == "val_loss"))
                sentences.append(f"{kind.capitalize()} loss{_of(run, runs)} {in_words(series)}")
    note = "Mean over the preference pairs" if any(map(_prefers, runs)) else "Mean cross-entropy per token, in nats"
    is_grouped = any(len(curve.x) > MAX_POINTS for curve in curves)
    note += "; line: mean of neighbouring steps, band: their range." if is_grouped else "."
    return _curves_figure("loss", "Loss", note, curves, sentences)


def _prefers(run: Run) -> bool:
    """Whether a run learns preferences (DPO and its like) rather than tokens."""
    loss = run.config.get("loss")
    component = str(loss.get("_component_", "")) if isinstance(loss, dict) else ""
    return "rlhf" in component or "DPO" in component


def _of_metric(runs: Sequence[Run], metric: str, title: str, note: str) -> Figure | None:
    logged = {i: run.series[metric] for i, run in enumerate(runs) if run.has(metric)}
    curves = [Curve(shorten(runs[i].name), series.steps, series.values, i) for i, series in logged.items()]
    sentences = [f"{title}{_of(runs[i], runs)} {in_words(series)}" for i, series in logged.items()]
    return _curves_figure(_key(metric), title, note, curves, sentences)


def _threshold_over_time(runs: Sequence[Run]) -> Figure | None:
    curves, sentences = [], []
    for i, run in enumerate(runs):
        by_step = [dict(zip(s.steps, s.values, strict=True)) for m in _THRESHOLDS if (s := run.series.get(m))]
        steps = sorted(set.intersection(*map(set, by_step))) if len(by_step) == len(_THRESHOLDS) else []
        if steps:
            low, median, high = ([values[step] for step in steps] for values in by_step)
            curves.append(Curve(shorten(run.name), steps, median, i, band=(low, high)))
            sentences.append(f"Median threshold{_of(run, runs)} {in_words(Series(steps, median))}")
    note = "Score that an entry needs to stay. Line: median over the tensors; band: the lowest and the highest."
    return _curves_figure("threshold", "Threshold", note, curves, sentences, log=True)


def _other_names(runs: Sequence[Run]) -> list[str]:
    """What else was logged at more than one step, such as a user's own metrics."""
    known = {*_LOSSES, *_THRESHOLDS, *_MEMORY, *(metric for metric, _, _ in _CURVES)}
    names = {name: None for run in runs for name, series in run.series.items() if len(series.steps) > 1}
    return [name for name in names if name not in known and not is_group_metric(name)]


def _thresholds_by_depth(runs: Sequence[Run]) -> list[Figure | None]:
    """One figure per run, all on the same axes: a line for each module over the layers."""
    last = {i: run.details["threshold"][-1] for i, run in enumerate(runs) if run.details.get("threshold")}
    grids = {i: to_grid(numbers) for i, (_, numbers) in last.items()}
    grids = {i: grid for i, grid in grids.items() if len(grid.layers) > 1}
    values = [value for grid in grids.values() for value, _, _ in grid.cells() if value > 0]
    figures = []
    for i, grid in grids.items():
        cells = grid.cells()
        if not values or len({value for value, _, _ in cells}) < 2:  # scope: global, or nothing to draw
            continue
        highest = max(cells, key=lambda cell: cell[0])
        columns = zip(*grid.values, strict=True)
        curves = [Curve(name, grid.layers, y, j) for j, (name, y) in enumerate(zip(grid.modules, columns, strict=True))]
        figures.append(
            _curves_figure(
                f"threshold-by-depth-{i}",
                f"Thresholds by depth{_of(runs[i], runs)}",
                f"Score that an entry needed to stay at step {last[i][0]}, for each module.",
                curves,
                [f"Highest: {short_number(highest[0])} in {highest[2]} of layer {highest[1]}"],
                log=True,
                xlabel="layer",
                limits=(min(values) / 1.3, max(values) * 1.3),
                columns=2,
                table=grid_table(grid),
            )
        )
    return figures


def _heat_maps(runs: Sequence[Run], kind: str, title: str, meaning: str, mean: bool = False) -> list[Figure]:
    """One heat map per run, all with the same colour scale."""
    grids: dict[int, tuple[Grid, str]] = {}
    for i, run in enumerate(runs):
        rows = run.details.get(kind)
        if rows:
            grid = to_grid(_mean(rows) if mean else rows[-1][1])
            when = f"mean of {len(rows)} logged steps" if mean and len(rows) > 1 else f"step {rows[-1][0]}"
            if grid.cells():
                grids[i] = grid, f"{meaning}; {when}."
    values = [value for grid, _ in grids.values() for value, _, _ in grid.cells()]
    low, top = min(values, default=0.0), max(values, default=1.0)
    if top - low < 0.1 * top:  # hardly any difference: let it look so
        low, top = 0.0, min(1.0, 2 * top)
    figures = []
    for i, (grid, note) in grids.items():
        lowest, highest = min(grid.cells()), max(grid.cells())
        if highest[0] - lowest[0] < 1e-9:
            seen = f". All cells are {short_number(lowest[0])}."
        else:
            seen = (
                f". From {short_number(lowest[0])} in {lowest[2]} of layer {lowest[1]} "
                f"to {short_number(highest[0])} in {highest[2]} of layer {highest[1]}."
            )
        title_of_run = f"{title}{_of(runs[i], runs)}"
        figures.append(grid_figure(f"{kind}-map-{i}", title_of_run, note, seen, grid, label=kind, low=low, top=top))
    return figures


def grid_figure(key: str, title: str, note: str, seen: str, grid: Grid, **how) -> Figure:
    """A heat map with its table; ``seen`` says in words what it shows."""
    alt = f"Heat map of {len(grid.layers)} layers by {len(grid.modules)} modules{seen}"
    return Figure(key, title, note, alt, partial(draw_grid, grid=grid, **how), grid_height(grid), grid_table(grid))


def _curves_figure(
    key: str,
    title: str,
    note: str,
    curves: Sequence[Curve],
    sentences: Sequence[str],
    *,
    columns: int = 1,
    table: Table | None = None,
    **how,
) -> Figure | None:
    """Curves on the same axes, and what they show in words; None where there is no curve."""
    if not curves:
        return None
    if not all(math.isfinite(value) for curve in curves for value in curve.y):
        note += " A cross at the bottom: NaN or infinity."
    draw = partial(draw_curves, curves=curves, legend_columns=columns, **how)
    return Figure(key, title, note, ". ".join(sentences) + ".", draw, 215 + legend_height(len(curves), columns), table)


def in_words(series: Series) -> str:
    """A curve in numbers: "goes from 2.3 at step 1 to 1.1 at step 40, lowest 0.9, highest 2.4"."""
    finite, bad = series.finite, len(series.values) - len(series.finite)
    broken = f"; {bad} of {len(series.values)} values are not finite" if bad else ""
    if not finite:
        return f"has no finite value in {len(series.values)} logged steps"
    if len(series.values) == 1:
        return f"is {short_number(series.last)} at step {series.steps[0]}"
    first, last = (f"{short_number(series.values[i])} at step {series.steps[i]}" for i in (0, -1))
    return (
        f"goes from {first} to {last}, lowest {short_number(min(finite))}, highest {short_number(max(finite))}{broken}"
    )


def grid_table(grid: Grid) -> Table:
    """A grid as a table; what lies outside the layers comes last, by name."""
    rows = [
        [str(layer), *("" if math.isnan(value) else short_number(value) for value in row)]
        for layer, row in zip(grid.layers, grid.values, strict=True)
    ]
    blanks = [""] * (len(grid.modules) - 1)
    rows += [[name, short_number(value), *blanks] for name, value in grid.outside.items()]
    return Table(["layer", *grid.modules], rows)


def _mean(rows: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for name, value in (item for _, numbers in rows for item in numbers.items()):
        if math.isfinite(value):
            values.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in values.items()}


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f" of {shorten(run.name)}" if len(runs) > 1 else ""


def _key(metric: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in metric.lower()).strip("-")
