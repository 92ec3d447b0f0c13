"""The kinds of plot that figures are made of: curves over steps, a grid of numbers, bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gmt_tune.reporting.parameter_names import Grid
from gmt_tune.reporting.theme import LIGHT, series_color, series_dash

# More points than this are drawn as the mean and the range of so many groups of neighbouring points.
MAX_POINTS = 240
_GROUPS = 120


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str  # for the legend
    x: Sequence[float]
    y: Sequence[float]  # values that are not finite are gaps, marked at the bottom
    index: int = 0  # decides the colour
    dashed: bool = False  # with dashes and dots, to tell it from another curve of the same colour
    band: tuple[Sequence[float], Sequence[float]] | None = None  # lower and upper ends of a range around the line


def shorten(name: str, longest: int = 30) -> str:
    """A name with its middle left out where it is too long for a label."""
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def draw_curves(
    canvas,
    curves: Sequence[Curve],
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    xlabel: str = "optimizer step",
    legend_columns: int = 1,
) -> None:
    """Draw curves on the same axes; a legend below them where there is more than one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = canvas.add_subplot()
    if log:
        drawn = [value for curve in curves for values in (curve.y, *(curve.band or ())) for value in values]
        _set_log_scale(axes, [*drawn, *(limits or ())])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    for curve in curves:
        _draw_curve(axes, curve)
    if not any(math.isfinite(value) for curve in curves for value in curve.y):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=LIGHT["muted"])
        axes.set_yticks([])
    if limits is not None:
        axes.set_ylim(*limits)
    elif not log:
        _widen_if_flat(axes)
    steps = [x for curve in curves for x in curve.x]
    if min(steps) == max(steps):
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.set_xlabel(xlabel)
    axes.grid(visible=False, axis="x")
    if len(curves) > 1:
        canvas.legend(
            loc="outside lower left", ncols=legend_columns, handlelength=2.2, columnspacing=1.2, borderaxespad=0.2
        )


def legend_height(entries: int, columns: int = 1) -> int:
    """CSS pixels that a legend adds to a figure's height."""
    return 0 if entries < 2 else 8 + 17 * math.ceil(entries / columns)


def draw_grid(canvas, grid: Grid, *, label: str, low: float = 0.0, top: float | None = None) -> None:
    """Draw a grid as a heat map: one row per layer, the first on top; one column per module."""
    import matplotlib
    import numpy as np

    axes = canvas.add_subplot()
    values = np.ma.masked_invalid(np.array(grid.values, dtype=float))
    highest = float(values.max()) if values.count() else 1.0
    colormap = matplotlib.colormaps["viridis"].resampled(32)
    mesh = axes.pcolormesh(
        values, cmap=colormap, vmin=low, vmax=top or highest or 1.0, edgecolor=LIGHT["card"], linewidth=0.6
    )
    axes.invert_yaxis()
    axes.set_xticks(
        [i + 0.5 for i in range(len(grid.modules))],
        [shorten(module) for module in grid.modules],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    shown = range(0, len(grid.layers), max(1, math.ceil(len(grid.layers) / 16)))
    axes.set_yticks([i + 0.5 for i in shown], [str(grid.layers[i]) for i in shown])
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = canvas.colorbar(mesh, ax=axes, pad=0.02, aspect=28, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.ax.grid(visible=False)


def grid_height(grid: Grid) -> int:
    """CSS pixels that a heat map's figure wants."""
    longest = max((len(shorten(module)) for module in grid.modules), default=0)
    return int(70 + 3.6 * longest + min(420, max(60, 15 * len(grid.layers))))


def draw_bars(canvas, labels: Sequence[str], values: Sequence[float], *, xlabel: str) -> None:
    """Draw horizontal bars, the first on top, each with its number."""
    from matplotlib.ticker import MaxNLocator

    axes = canvas.add_subplot()
    bars = axes.barh(range(len(labels)), values, color=series_color(0), height=0.66)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=9.5, color=LIGHT["ink"])
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))


def _set_log_scale(axes, values: Sequence[float]) -> None:
    """A logarithmic axis with ticks where one would look for them, also within less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return
    decades = math.log10(max(positive) / min(positive))
    axes.set_yscale("log")
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades < math.log10(2):  # a narrow stretch of it is nearly linear
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))


def _widen_if_flat(axes) -> None:
    """Show at least one percent of a curve's height, so that rounding does not look like news, and ticks differ."""
    low, high = axes.get_ylim()
    least = 0.01 * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _draw_curve(axes, curve: Curve) -> None:
    color = series_color(curve.index)
    y = [value if math.isfinite(value) else math.nan for value in curve.y]
    x, (lower, upper) = list(curve.x), curve.band or (None, None)
    if len(x) > MAX_POINTS:
        x, y, lower, upper = _grouped(x, y, lower, upper)
    axes.plot(
        x,
        y,
        label=" " * curve.label.startswith("_") + shorten(curve.label, 44),  # matplotlib hides what begins with "_"
        color=color,
        linestyle=(0, (4, 2)) if curve.dashed else series_dash(curve.index),
        marker="o" if curve.dashed or len(x) <= 30 else None,
        markersize=3.5,
    )
    if lower is not None and len(x) == 1:
        axes.vlines(x, lower, upper, color=color, alpha=0.4, linewidth=5)
    elif lower is not None:
        axes.fill_between(x, lower, upper, color=color, alpha=0.18, linewidth=0)
    bad = [step for step, value in zip(curve.x, curve.y, strict=True) if not math.isfinite(value)]
    if bad:
        bad = bad[:: max(1, len(bad) // 60)]
        axes.plot(
            bad, [0.03] * len(bad), "x", transform=axes.get_xaxis_transform(), color=color, markersize=6, clip_on=False
        )


def _grouped(x, y, lower, upper):
    """Mean and range of neighbouring points, in groups of equal size."""
    size = math.ceil(len(x) / _GROUPS)
    lower, upper = lower or y, upper or y
    means = []
    for start in range(0, len(x), size):
        group = slice(start, start + size)
        finite = [value for value in y[group] if math.isfinite(value)]
        low = min((value for value in lower[group] if math.isfinite(value)), default=math.nan)
        high = max((value for value in upper[group] if math.isfinite(value)), default=math.nan)
        mean = sum(finite) / len(finite) if finite else math.nan
        means.append((sum(x[group]) / len(x[group]), mean, low, high))
    return tuple(list(column) for column in zip(*means, strict=True))


def _tick(value: float, _position=None) -> str:
    """Tick labels as short as they go: 0.0002, 2e-05, 12k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.6g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"
