"""From the results on disk to ``docs/results``: tables in Markdown, and figures. Nothing in them is typed by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import overview, reasons, results
from benchmarks.quality.experiment import Method, Suite, load_method, load_suite, suite_names
from benchmarks.quality.statistics import Estimate, estimate, paired_difference
from benchmarks.quality.tables import ACCURACY, FORGETTING, Measure, by_chance, count, interval, table
from gmt_tune.reporting.drawing import Figure, to_png
from gmt_tune.reporting.plots import Curve, draw_curves, legend_height
from gmt_tune.reporting.theme import LIGHT, series_color

# What methods are compared with, seed by seed, and how a column calls it.
BASELINES = {"sft": "SFT", "gmt_0.2": "GMT 0.2"}
PAGE = results.RESULTS / "tables.md"
FIGURES = results.RESULTS / "figures"
# The methods whose learning curves are drawn: more of them hide each other.
_CURVES = ("sft", "gmt_0.2", "rmt_0.2", "oneoff_0.2", "half", "lora", "compact_0.2_refresh10", "compact_0.2_refresh1")


@dataclass(frozen=True)
class Row:
    """A method's measured runs in a suite."""

    method: Method
    learning_rate: float
    runs: dict[int, dict]

    def values(self, get: Callable[[dict], float | None]) -> dict[int, float]:
        """A number by seed, of the runs that have it."""
        found = {seed: get(run) for seed, run in self.runs.items() if not run["failed"]}
        return {seed: value for seed, value in found.items() if value is not None}


def write_report() -> list[Path]:
    """Write the page of tables and all figures; returns the files."""
    files = [PAGE]
    parts = [
        "---\norphan: true\n---\n\n# Results: tables and figures\n",
        "<!-- Made by `python -m benchmarks.quality table` from docs/results/runs: edit nothing here. -->\n",
        "[The discussion](../results.md) says what to make of them, and how all was measured. Numbers are means over "
        "seeds ± standard deviation; differences are paired by seed (same data in the same order), with their 95% "
        "confidence interval (of three seeds or more), **bold** where it leaves out zero. Each method has the learning "
        "rate that the validation split chose, unless the last lines of its task say otherwise. Forgetting is the "
        "rise of the loss on text that training does not show: the village's pretraining text, or English and code "
        "(SmolLM2).\n",
    ]
    reasons_text, reasons_figures = reasons.build()
    for figure in reasons_figures:
        reasons_text += f"\n![{figure.alt}](figures/{figure.key}.png)\n\n{figure.note}\n"
    parts += [reasons_text]
    files += [to_png(figure, FIGURES) for figure in reasons_figures]
    for name in suite_names():
        suite = load_suite(name)
        rows = read_rows(suite)
        if not rows:
            continue
        figures = build_figures(suite, rows)
        files += [to_png(figure, FIGURES) for figure in figures]
        parts.append(_section(suite, rows, figures))
    results.RESULTS.mkdir(parents=True, exist_ok=True)
    parts.insert(3, _comparisons("\n".join(parts)))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    overview.write()
    return [*files, overview.PAGE]


def _comparisons(page: str) -> str:
    """How many differences with an interval a page shows, and how many of them leave out zero."""
    found, marked = len(re.findall(r"\[[+-]", page)), len(re.findall(r"\*\*[+-][\d.]+ \[", page))
    return f"This page makes {found:,} comparisons with an interval, {by_chance(found, marked)}\n"


def read_rows(suite: Suite) -> list[Row]:
    """The methods of a suite that have results, in its order."""
    rows = []
    for name in suite.methods:
        method = load_method(name)
        runs = results.measured(suite, method)
        if runs:
            rows.append(Row(method, results.chosen_learning_rate(suite, method), runs))
    return rows


# ---------------------------------------------------------------------- tables


def _section(suite: Suite, rows: list[Row], figures: list[Figure]) -> str:
    base = results.read(f"{suite.name}/base/measure_lr0_seed0")
    text = [f"## {suite.title}\n"]
    if base is not None:
        texts = ", ".join(f"loss on {name} {value:.3f}" for name, value in base["texts"].items())
        text.append(
            f"Before training: test loss {base['losses']['test']:.3f}, accuracy {base['accuracy']:.1%} "
            f"({base['questions']} questions), {texts}.\n"
        )
    text.append(_effort(suite))
    text += [_quality_table(rows, base), _difference_table(rows, base), _convergence_table(rows)]
    text += [_cost_table(suite, rows), _choice_table(suite, rows)]
    other_rates = _other_rates_table(suite, rows, base)
    text += [other_rates] if other_rates else []
    text += [f"![{figure.alt}](figures/{figure.key}.png)\n\n{figure.note}\n" for figure in figures]
    return "\n".join(text)


def _effort(suite: Suite) -> str:
    """How many runs there are of a suite, those that chose a rate included, and their CPU time."""
    runs = [run for run in results.read_all(suite.name).values() if run.get("train_cpu_seconds") is not None]
    seconds = sum(run["train_cpu_seconds"] + (run.get("evaluation_seconds") or 0) for run in runs)
    return f"{len(runs)} runs, {seconds / 3600:.1f} hours of CPU time.\n"


def _quality_table(rows: list[Row], base: dict | None) -> str:
    names = list(base["texts"]) if base is not None else []
    head = ["method", "lr", "seeds", "test loss", "accuracy, %"]
    head += [f"forgetting, {name}" for name in names] + ["weights changed, %"]
    lines = [head]
    for row in rows:
        cells = [row.method.title, f"{row.learning_rate:g}", count(row.runs)]
        cells += [_mean(row.values(_test_loss), 4), _mean(row.values(_accuracy), 1)]
        cells += [_mean(row.values(forgetting(base, name)), 3) for name in names]
        cells += [_mean(row.values(_changed), 1)]
        lines.append(cells)
    return table(lines)


def _difference_table(rows: list[Row], base: dict | None) -> str:
    """Each method against plain fine-tuning and against the default mask, by seed."""
    head, against = ["paired difference of"], []
    text = next(iter(base["texts"]), None) if base is not None else None
    for name in BASELINES:
        other = next((row for row in rows if row.method.name == name), None)
        if other is not None:
            head += [f"test loss, minus {BASELINES[name]}", f"accuracy, minus {BASELINES[name]}"]
            head += [f"forgetting, {text}, minus {BASELINES[name]}"] if text else []
            against.append(other)
    lines = [head]
    for row in rows:
        cells = [row.method.title]
        for other in against:
            cells += [_difference(row, other, _test_loss, 4), _difference(row, other, _accuracy, 1)]
            cells += [_difference(row, other, forgetting(base, text), 3)] if text else []
        lines.append(cells)
    return table(lines)


def _convergence_table(rows: list[Row]) -> str:
    """Validation loss on the way, and its paired difference to plain fine-tuning, where a recipe validates."""
    validated = [row for row in rows if any(run["validation_loss"] for run in row.runs.values() if not run["failed"])]
    if not validated:
        return ""
    steps = [step for step, _ in next(iter(validated[0].runs.values()))["validation_loss"]]
    shown = sorted({steps[0], steps[(len(steps) - 1) // 2], steps[-1]})
    baseline = next((row for row in validated if row.method.name == "sft"), None)
    head = ["validation loss"] + [text for step in shown for text in (f"step {step}", "minus SFT")]
    lines = [head]
    for row in validated:
        cells = [row.method.title]
        for step in shown:
            cells += [_mean(row.values(_validation(step)), 4), _difference(row, baseline, _validation(step), 4)]
        lines.append(cells)
    return table(lines)


def _cost_table(suite: Suite, rows: list[Row]) -> str:
    head = ["method", "s / step", "of it the mask, s", "training, CPU s", "peak memory, GiB", "run again with"]
    lines = [head]
    for row in rows:
        command = f"`python -m benchmarks.quality run {suite.name} {row.method.name} --again`"
        lines.append(
            [
                row.method.title,
                _mean(row.values(lambda run: run["seconds_per_step"]), 3),
                _mean(row.values(lambda run: run["mask_seconds"]), 4),
                _mean(row.values(lambda run: run["train_cpu_seconds"]), 1),
                _mean(row.values(lambda run: run["peak_memory_gib"]), 2),
                command,
            ]
        )
    return table(lines, text=(0, -1))


def _choice_table(suite: Suite, rows: list[Row]) -> str:
    tried = {rate for row in rows for rate in results.choosing_losses(suite, row.method)}
    rates = sorted(tried or map(float, suite.choose["learning_rates"]))
    choosers = [row for row in rows if row.method.learning_rate_of == row.method.name]
    if len(rates) == 1 or not choosers:
        return f"All at learning rate {rates[0]:g}, which was not chosen on a validation split.\n"
    count = len(suite.choose["seeds"])
    lines = [["validation loss that chose the rate", *(f"{rate:g}" for rate in rates)]]
    for row in choosers:
        losses = results.choosing_losses(suite, row.method)
        cells = []
        for rate in rates:
            mean = sum(losses[rate]) / len(losses[rate]) if rate in losses else None
            cell = "" if mean is None else f"{mean:.4f}" if math.isfinite(mean) else "diverged"
            cells.append(f"**{cell}**" if rate == row.learning_rate else cell)
        lines.append([row.method.title, *cells])
    are_measured = set(suite.choose["seeds"]) <= set(suite.seeds)
    which = "of the measured runs" if are_measured else "that no measured run has"
    note = f"With {count} seed{'s' if count > 1 else ''} {which}.\n"
    return table(lines) + "\n" + note


def _other_rates_table(suite: Suite, rows: list[Row], base: dict | None) -> str:
    """Whole runs at each rate, of methods that ran at more than the one above: what the choice of the rate did."""
    names = list(base["texts"]) if base is not None else []
    head = ["at each learning rate", "lr", "seeds", "validation loss", "test loss", "accuracy, %"]
    head += [f"forgetting, {name}" for name in names] + ["run again with"]
    lines = [head]
    for row in rows:
        others = results.measured_at_other_rates(suite, row.method)
        if not others:
            continue
        for rate, runs in sorted((others | {row.learning_rate: row.runs}).items()):
            one = Row(row.method, rate, runs)
            cells = [row.method.title, f"{rate:g}", count(one.runs)]
            cells += [_mean(one.values(lambda run: run["losses"]["validation"]), 4)]
            cells += [_mean(one.values(_test_loss), 4), _mean(one.values(_accuracy), 1)]
            cells += [_mean(one.values(forgetting(base, name)), 3) for name in names]
            command = f"run {suite.name} {row.method.name} --again --lr {rate:g}"
            lines.append([*cells, f"`python -m benchmarks.quality {command}`"])
    return table(lines, text=(0, -1)) if len(lines) > 1 else ""


def _mean(values: dict[int, float], digits: int) -> str:
    if not values:
        return ""
    found = estimate(list(values.values()))
    spread = f" ± {found.sd:.{digits}f}" if found.sd is not None else ""
    return f"{found.mean:.{digits}f}{spread}"


def _difference(row: Row, other: Row | None, get, digits: int) -> str:
    if other is None or row is other:
        return ""
    found = paired_difference(row.values(get), other.values(get))
    return interval(found, digits)


# ---------------------------------------------------------------------- numbers of a run


def _test_loss(run: dict) -> float:
    return run["losses"]["test"]


def _accuracy(run: dict) -> float:
    return 100 * run["accuracy"]


def _validation(step: int) -> Callable[[dict], float | None]:
    return lambda run: dict(map(tuple, run["validation_loss"])).get(step)


def _changed(run: dict) -> float:
    return 100 * run["change"]["fraction_changed"]


def forgetting(base: dict, name: str) -> Callable[[dict], float]:
    """Function of a run: how much its loss on the text of that name rose."""
    return lambda run: run["texts"][name] - base["texts"][name]


# ---------------------------------------------------------------------- figures


def build_figures(suite: Suite, rows: list[Row]) -> list[Figure]:
    """Learning curves; accuracy against density; forgetting against accuracy; both of compact states."""
    figures = [
        _learning_curves(suite, rows),
        _by_density(suite, rows),
        _forgetting_figure(suite, rows),
        _compact_figure(suite, rows),
    ]
    return [figure for figure in figures if figure is not None]


def _learning_curves(suite: Suite, rows: list[Row]) -> Figure | None:
    curves, sentences = [], []
    for row in rows:
        series = [run["validation_loss"] for run in row.runs.values() if not run["failed"] and run["validation_loss"]]
        if row.method.name not in _CURVES or not series:
            continue
        steps = [step for step, _ in series[0]]
        columns = [[dict(map(tuple, one)).get(step, math.nan) for one in series] for step in steps]
        means = [sum(column) / len(column) for column in columns]
        band = ([min(column) for column in columns], [max(column) for column in columns])
        curves.append(Curve(row.method.title, steps, means, len(curves), band=band))
        sentences.append(f"{row.method.title} ends at {means[-1]:.4g}")
    if not curves:
        return None
    return Figure(
        key=f"{suite.name}_curves",
        title="Held-out loss over training",
        note="Validation loss; line: mean over seeds, band: their range. torchtune's LoRA recipe validates nothing.",
        alt=f"Curves of the validation loss: {'; '.join(sentences)}.",
        draw=lambda canvas: draw_curves(canvas, curves, log=True),
        height=230 + legend_height(len(curves)),
    )


def _by_density(suite: Suite, rows: list[Row]) -> Figure | None:
    points = [row for row in rows if row.method.density is not None and row.values(_accuracy)]
    line = sorted(
        (row for row in points if row.method.name.startswith("gmt_") or row.method.name == "sft"),
        key=lambda row: row.method.density,
    )
    others = [row for row in points if row not in line]
    if len(line) < 3:
        return None

    def draw(canvas) -> None:
        axes = canvas.add_subplot()
        x = [row.method.density for row in line]
        _error_bars(
            axes, x, [estimate(list(row.values(_accuracy).values())) for row in line], 0, "GMT; 1.0 is SFT", "-"
        )
        for index, row in enumerate(others, start=1):
            found = estimate(list(row.values(_accuracy).values()))
            _error_bars(axes, [row.method.density], [found], index, row.method.title, "none")
        axes.set_xlabel("density")
        axes.set_ylabel("accuracy on the test split, %")
        canvas.legend(loc="outside lower left", handlelength=2.2)

    sentences = [f"{row.method.density:g}: {estimate(list(row.values(_accuracy).values())).mean:.1f}%" for row in line]
    return Figure(
        key=f"{suite.name}_density",
        title="Accuracy against density",
        note="Exact match on the test split; bars: 95% interval of the mean over seeds.",
        alt=f"Accuracy at density {', '.join(sentences)}.",
        draw=draw,
        height=240 + legend_height(1 + len(others)),
    )


def _forgetting_figure(suite: Suite, rows: list[Row]) -> Figure | None:
    base = results.read(f"{suite.name}/base/measure_lr0_seed0")
    shown = [row for row in rows if row.values(_accuracy) and row.method.learning_rate_of == row.method.name]
    if base is None or len(shown) < 2:
        return None
    name = next(iter(base["texts"]))
    _, measure = overview.TASKS.get(suite.name, ("", ACCURACY))

    def values(row: Row, of: Measure) -> dict[int, float]:
        return row.values(lambda run: of.of_run(run, base))

    def draw(canvas) -> None:
        axes = canvas.add_subplot()
        for index, row in enumerate(shown):
            x, y = (estimate(list(values(row, of).values())) for of in (measure, FORGETTING))
            axes.errorbar(
                [x.mean],
                [y.mean],
                xerr=[x.half_width or 0],
                yerr=[y.half_width or 0],
                fmt=_MARKERS[index // 8 % len(_MARKERS)],
                color=series_color(index),
                label=row.method.title,
                capsize=2,
            )
        axes.set_xlabel("accuracy on the test split, %" if measure is ACCURACY else measure.title)
        axes.set_ylabel(f"rise of the loss on {name}")
        canvas.legend(loc="outside lower left", handlelength=1.5)

    sentences = []
    for row in shown:
        x, y = (_mean(values(row, of), of.digits) for of in (measure, FORGETTING))
        sentences.append(f"{row.method.title} {x} and {y}")
    what, better = measure.title.removesuffix(", %"), "right" if measure is ACCURACY else "left"
    return Figure(
        key=f"{suite.name}_forgetting",
        title=f"Forgetting against {what}",
        note=f"Low and to the {better} is better. Bars: 95% interval of the mean over seeds. Forgetting: of {name}.",
        alt=f"{what.capitalize()} and rise of the loss on {name}: {'; '.join(sentences)}.",
        draw=draw,
        height=240 + legend_height(len(shown)),
    )


_MARKERS = ("o", "s", "^")


def _compact_figure(suite: Suite, rows: list[Row]) -> Figure | None:
    """Accuracy and forgetting at each density: compact states with each refresh, the mask with AdamW, and SFT."""
    base = results.read(f"{suite.name}/base/measure_lr0_seed0")
    named = {row.method.name: row for row in rows if row.values(_accuracy)}
    lines = {
        f"{kind}, refreshed every {'step' if every == 1 else f'{every} steps'}": of_line
        for kind, every, names in (
            ("AdamW with a mask", 1, ("gmt_0.05", "gmt_0.1", "gmt_0.2")),
            *(
                ("CompactAdamW", n, tuple(f"compact_{d}_refresh{n}" for d in ("0.05", "0.1", "0.2")))
                for n in (1, 10, 30)
            ),
        )
        if len(of_line := [named[name] for name in names if name in named]) == len(names)
    }
    if base is None or len(lines) < 2 or "sft" not in named:
        return None
    name = next(iter(base["texts"]))
    panels = (
        ("accuracy on the test split, %", _accuracy),
        (f"rise of the loss on {name}", forgetting(base, name)),
    )

    def draw(canvas) -> None:
        for axes, (label, get) in zip(canvas.subplots(1, 2), panels, strict=True):
            for index, (title, of_line) in enumerate(lines.items()):
                found = [estimate(list(row.values(get).values())) for row in of_line]
                places = [place + 0.06 * index - 0.09 for place in range(len(of_line))]  # bars beside one another
                _error_bars(axes, places, found, index, title, "-")
            axes.axhline(estimate(list(named["sft"].values(get).values())).mean, color=LIGHT["muted"], linestyle="--")
            axes.set_xticks(range(3), [f"{row.method.config['gradient_mask']['density']:g}" for row in of_line])
            axes.set_xlabel("density; dashed: SFT")
            axes.set_ylabel(label)
        canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower left", handlelength=2.2)

    sentences = [
        f"{title}: {', '.join(_mean(row.values(_accuracy), 1) + '%' for row in of_line)}"
        for title, of_line in lines.items()
    ]
    return Figure(
        key=f"{suite.name}_compact",
        title="Compact states: accuracy and forgetting",
        note=f"Bars: 95% interval of the mean over seeds. Forgetting: of {name}. Higher on the left, and lower on the "
        "right, is better.",
        alt=f"Accuracy at density 0.05, 0.1 and 0.2. {'; '.join(sentences)}.",
        draw=draw,
        height=240 + legend_height(len(lines)),
    )


def _error_bars(axes, x: list[float], found: list[Estimate], index: int, label: str, line: str) -> None:
    axes.errorbar(
        x,
        [one.mean for one in found],
        yerr=[one.half_width or 0 for one in found],
        fmt="o",
        linestyle=line,
        color=series_color(index),
        label=label,
        capsize=2,
    )
