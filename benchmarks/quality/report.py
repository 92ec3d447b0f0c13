"""From the results on disk to ``docs/results``: tables in Markdown, and figures. Nothing in them is typed by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import overview, reasons, results
from benchmarks.quality.experiment import Suite, load_suite, suite_names
from benchmarks.quality.statistics import Estimate
from benchmarks.quality.tables import (
    ACCURACY,
    CHANGED,
    FORGETTING,
    TEST_LOSS,
    Compared,
    Measure,
    Measured,
    by_chance,
    compare,
    count,
    forgetting,
    interval,
    table,
)
from gmt_tune.reporting.drawing import Figure, to_png
from gmt_tune.reporting.plots import Curve, draw_curves, legend_height
from gmt_tune.reporting.theme import LIGHT, series_color

# What methods are compared with, seed by seed, and how a column calls it.
BASELINES = {"sft": "SFT", "gmt_0.2": "GMT 0.2"}
PAGE = results.RESULTS / "tables.md"
FIGURES = results.RESULTS / "figures"
# The methods whose learning curves are drawn: more of them hide each other.
_CURVES = ("sft", "gmt_0.2", "rmt_0.2", "oneoff_0.2", "half", "lora", "compact_0.2_refresh10", "compact_0.2_refresh1")


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
    for task in compare({name: load_suite(name).title for name in suite_names()}):
        figures = build_figures(task)
        files += [to_png(figure, FIGURES) for figure in figures]
        parts.append(_section(task, figures))
    results.RESULTS.mkdir(parents=True, exist_ok=True)
    parts.insert(3, _comparisons("\n".join(parts)))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    overview.write()
    return [*files, overview.PAGE]


def _comparisons(page: str) -> str:
    """How many differences with an interval a page shows, and how many of them leave out zero."""
    found, marked = len(re.findall(r"\[[+-]", page)), len(re.findall(r"\*\*[+-][\d.]+ \[", page))
    return f"This page makes {found:,} comparisons with an interval, {by_chance(found, marked)}\n"


# ---------------------------------------------------------------------- tables


def _section(task: Compared, figures: list[Figure]) -> str:
    base = task.base
    texts = ", ".join(f"loss on {name} {value:.3f}" for name, value in base["texts"].items())
    text = [
        f"## {task.title}\n",
        f"Before training: test loss {base['losses']['test']:.3f}, accuracy {base['accuracy']:.1%} "
        f"({base['questions']} questions), {texts}.\n",
        _effort(task.suite),
    ]
    text += [_quality_table(task), _difference_table(task), _convergence_table(task), _cost_table(task)]
    text += [_choice_table(task)]
    other_rates = _other_rates_table(task)
    text += [other_rates] if other_rates else []
    text += [f"![{figure.alt}](figures/{figure.key}.png)\n\n{figure.note}\n" for figure in figures]
    return "\n".join(text)


def _effort(suite: Suite) -> str:
    """How many runs there are of a suite, those that chose a rate included, and their CPU time."""
    runs = [run for run in results.read_all(suite.name).values() if run.get("train_cpu_seconds") is not None]
    seconds = sum(run["train_cpu_seconds"] + (run.get("evaluation_seconds") or 0) for run in runs)
    return f"{len(runs)} runs, {seconds / 3600:.1f} hours of CPU time (of an interrupted run, since its last start).\n"


def _quality_table(task: Compared) -> str:
    measures = [_TEST_LOSS, ACCURACY, *_forgetting_of_each(task), _CHANGED]
    lines = [["method", "lr", "seeds", *(measure.title for measure in measures)]]
    for row in task.methods.values():
        cells = [row.method.title, f"{row.learning_rate:g}", count(row.runs)]
        lines.append(cells + [_mean(row, measure) for measure in measures])
    return table(lines)


def _difference_table(task: Compared) -> str:
    """Each method against plain fine-tuning and against the default mask, by seed."""
    text = next(iter(task.base["texts"]))
    measures = (_TEST_LOSS, replace(ACCURACY, title="accuracy"), forgetting(text, f"forgetting, {text}"))
    columns = [(task.methods[name], m) for name in BASELINES if name in task.methods for m in measures]
    head = [f"{measure.title}, minus {BASELINES[other.method.name]}" for other, measure in columns]
    lines = [["paired difference of", *head]]
    for row in task.methods.values():
        lines.append([row.method.title, *(_difference(row, other, measure) for other, measure in columns)])
    return table(lines)


def _convergence_table(task: Compared) -> str:
    """Validation loss on the way, and its paired difference to plain fine-tuning, where a recipe validates."""
    rows = task.methods.values()
    validated = [row for row in rows if any(run["validation_loss"] for run in row.runs.values() if not run["failed"])]
    if not validated:
        return ""
    steps = [step for step, _ in next(iter(validated[0].runs.values()))["validation_loss"]]
    measures = [_validation(step) for step in sorted({steps[0], steps[(len(steps) - 1) // 2], steps[-1]})]
    baseline = next((row for row in validated if row.method.name == "sft"), None)
    lines = [["validation loss"] + [text for measure in measures for text in (measure.title, "minus SFT")]]
    for row in validated:
        cells = [(_mean(row, measure), _difference(row, baseline, measure)) for measure in measures]
        lines.append([row.method.title, *(cell for both in cells for cell in both)])
    return table(lines)


def _cost_table(task: Compared) -> str:
    lines = [["method", *(measure.title for measure in _COSTS), "run again with"]]
    for row in task.methods.values():
        command = f"`python -m benchmarks.quality run {task.suite.name} {row.method.name} --again`"
        lines.append([row.method.title, *(_mean(row, measure) for measure in _COSTS), command])
    return table(lines, text=(0, -1))


def _choice_table(task: Compared) -> str:
    suite, rows = task.suite, task.methods.values()
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


def _other_rates_table(task: Compared) -> str:
    """Whole runs at each rate, of methods that ran at more than the one above: what the choice of the rate did."""
    measures = [_VALIDATION_LOSS, _TEST_LOSS, ACCURACY, *_forgetting_of_each(task)]
    lines = [["at each learning rate", "lr", "seeds", *(measure.title for measure in measures), "run again with"]]
    for row in task.methods.values():
        others = results.measured_at_other_rates(task.suite, row.method)
        if not others:
            continue
        for rate, runs in sorted((others | {row.learning_rate: row.runs}).items()):
            one = replace(row, learning_rate=rate, runs=runs)
            cells = [row.method.title, f"{rate:g}", count(one.runs), *(_mean(one, measure) for measure in measures)]
            command = f"run {task.suite.name} {row.method.name} --again --lr {rate:g}"
            lines.append([*cells, f"`python -m benchmarks.quality {command}`"])
    return table(lines, text=(0, -1)) if len(lines) > 1 else ""


def _mean(row: Measured, measure: Measure) -> str:
    found = row.estimate(measure)
    if found is None:
        return ""
    spread = f" ± {found.sd:.{measure.digits}f}" if found.sd is not None else ""
    return f"{found.mean:.{measure.digits}f}{spread}"


def _difference(row: Measured, other: Measured | None, measure: Measure) -> str:
    return "" if other is None or row is other else interval(row.minus(other, measure), measure.digits)


# ---------------------------------------------------------------------- numbers of a run

_TEST_LOSS = replace(TEST_LOSS, digits=4)
_VALIDATION_LOSS = Measure("validation loss", 4, lambda run, base: run["losses"]["validation"])
_CHANGED = replace(CHANGED, digits=1)
_COSTS = (
    Measure("s / step", 3, lambda run, base: run["seconds_per_step"]),
    Measure("of it the mask, s", 4, lambda run, base: run["mask_seconds"]),
    Measure("training, CPU s", 1, lambda run, base: run["train_cpu_seconds"]),
    Measure("peak memory, GiB", 2, lambda run, base: run["peak_memory_gib"]),
)


def _validation(step: int) -> Measure:
    return Measure(f"step {step}", 4, lambda run, base: dict(map(tuple, run["validation_loss"])).get(step))


def _forgetting_of_each(task: Compared) -> list[Measure]:
    """Of each text that training does not show."""
    return [forgetting(name, f"forgetting, {name}") for name in task.base["texts"]]


# ---------------------------------------------------------------------- figures


def build_figures(task: Compared) -> list[Figure]:
    """Learning curves; accuracy against density; forgetting against accuracy; both of compact states."""
    figures = [_learning_curves(task), _by_density(task), _forgetting_figure(task), _compact_figure(task)]
    return [figure for figure in figures if figure is not None]


def _learning_curves(task: Compared) -> Figure | None:
    curves, sentences = [], []
    for row in task.methods.values():
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
        key=f"{task.suite.name}_curves",
        title="Held-out loss over training",
        note="Validation loss; line: mean over seeds, band: their range. torchtune's LoRA recipe validates nothing.",
        alt=f"Curves of the validation loss: {'; '.join(sentences)}.",
        draw=lambda canvas: draw_curves(canvas, curves, log=True),
        height=230 + legend_height(len(curves)),
    )


def _by_density(task: Compared) -> Figure | None:
    points = [row for row in task.methods.values() if row.method.density is not None and row.values(ACCURACY)]
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
        _error_bars(axes, x, [row.estimate(ACCURACY) for row in line], 0, "GMT; 1.0 is SFT", "-")
        for index, row in enumerate(others, start=1):
            _error_bars(axes, [row.method.density], [row.estimate(ACCURACY)], index, row.method.title, "none")
        axes.set_xlabel("density")
        axes.set_ylabel("accuracy on the test split, %")
        canvas.legend(loc="outside lower left", handlelength=2.2)

    sentences = [f"{row.method.density:g}: {row.estimate(ACCURACY).mean:.1f}%" for row in line]
    return Figure(
        key=f"{task.suite.name}_density",
        title="Accuracy against density",
        note="Exact match on the test split; bars: 95% interval of the mean over seeds.",
        alt=f"Accuracy at density {', '.join(sentences)}.",
        draw=draw,
        height=240 + legend_height(1 + len(others)),
    )


def _forgetting_figure(task: Compared) -> Figure | None:
    rows = task.methods.values()
    shown = [row for row in rows if row.values(ACCURACY) and row.method.learning_rate_of == row.method.name]
    if len(shown) < 2:
        return None
    name = next(iter(task.base["texts"]))
    _, measure = overview.TASKS.get(task.suite.name, ("", ACCURACY))

    def draw(canvas) -> None:
        axes = canvas.add_subplot()
        for index, row in enumerate(shown):
            x, y = (row.estimate(of) for of in (measure, FORGETTING))
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
        x, y = (_mean(row, of) for of in (measure, FORGETTING))
        sentences.append(f"{row.method.title} {x} and {y}")
    what, better = measure.title.removesuffix(", %"), "right" if measure is ACCURACY else "left"
    return Figure(
        key=f"{task.suite.name}_forgetting",
        title=f"Forgetting against {what}",
        note=f"Low and to the {better} is better. Bars: 95% interval of the mean over seeds. Forgetting: of {name}.",
        alt=f"{what.capitalize()} and rise of the loss on {name}: {'; '.join(sentences)}.",
        draw=draw,
        height=240 + legend_height(len(shown)),
    )


_MARKERS = ("o", "s", "^")


def _compact_figure(task: Compared) -> Figure | None:
    """Accuracy and forgetting at each density: compact states with each refresh, the mask with AdamW, and SFT."""
    named = {name: row for name, row in task.methods.items() if row.values(ACCURACY)}
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
    if len(lines) < 2 or "sft" not in named:
        return None
    name = next(iter(task.base["texts"]))
    panels = (("accuracy on the test split, %", ACCURACY), (f"rise of the loss on {name}", FORGETTING))

    def draw(canvas) -> None:
        for axes, (label, measure) in zip(canvas.subplots(1, 2), panels, strict=True):
            for index, (title, of_line) in enumerate(lines.items()):
                found = [row.estimate(measure) for row in of_line]
                places = [place + 0.06 * index - 0.09 for place in range(len(of_line))]  # bars beside one another
                _error_bars(axes, places, found, index, title, "-")
            axes.axhline(named["sft"].estimate(measure).mean, color=LIGHT["muted"], linestyle="--")
            axes.set_xticks(range(3), [f"{row.method.config['gradient_mask']['density']:g}" for row in of_line])
            axes.set_xlabel("density; dashed: SFT")
            axes.set_ylabel(label)
        canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower left", handlelength=2.2)

    sentences = [
        f"{title}: {', '.join(_mean(row, ACCURACY) + '%' for row in of_line)}" for title, of_line in lines.items()
    ]
    return Figure(
        key=f"{task.suite.name}_compact",
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
