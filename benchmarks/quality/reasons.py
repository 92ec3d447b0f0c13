"""Why masks with AdamW do what they do: the village's controls side by side, from the results on disk alone.

``build`` gives a section of Markdown and a figure; ``report`` writes them.
"""

from __future__ import annotations

from benchmarks.quality.experiment import load_method
from benchmarks.quality.tables import (
    ACCURACY,
    CHANGED,
    FORGETTING,
    TEST_LOSS,
    Compared,
    Measure,
    by_chance,
    compare,
    count,
    interval,
    mean,
    table,
)
from gmt_tune.reporting.drawing import Figure
from gmt_tune.reporting.plots import legend_height
from gmt_tune.reporting.theme import LIGHT, series_color

SUITES = {"village_ample": "ample", "village_small": "little"}
# By what they test: methods, and what a row of the figure calls each. All masks have density 0.2.
GROUPS = {
    "plain AdamW": {"sft": "SFT"},
    "noisier": {"sft_small_batch": "SFT, 1 question a step", "sft_beta2_0.95": "SFT, beta2 0.95"},
    "zeros in the moments (masked)": {
        "gmt_0.2": "gradient, refresh 1",
        "gmt_0.2_refresh10": "gradient, refresh 10",
        "rmt_0.2": "random, refresh 1",
        "rmt_0.2_refresh10": "random, refresh 10",
    },
    "first moment emptied": {"gmt_0.2_momentum_reset": "gradient, refresh 1"},
    "whole moments, update masked": {
        "update_mask_0.2": "refresh 1",
        "update_mask_0.2_scaled": "refresh 1, times 5",
        "update_mask_0.2_refresh10": "refresh 10",
    },
    "moments stand still": {
        "sparse_adam_0.2": "refresh 1",
        "sparse_adam_0.2_refresh10": "refresh 10",
    },
    "moments restart (compact)": {
        "compact_0.2_refresh1": "gradient, refresh 1",
        "compact_0.2_refresh10": "gradient, refresh 10",
        "compact_0.2_random_refresh1": "random, refresh 1",
        "compact_0.2_random": "random, refresh 10",
    },
    "compact, one age for a tensor": {
        "compact_0.2_one_age_refresh1": "refresh 1",
        "compact_0.2_one_age": "refresh 10",
    },
}
# Each pair is compared seed by seed, the first minus the second.
QUESTIONS = {
    "What do zeros in Adam's moments do? Other moments under the same selection": (
        ("gmt_0.2_momentum_reset", "gmt_0.2"),
        ("update_mask_0.2", "gmt_0.2"),
        ("sparse_adam_0.2", "gmt_0.2"),
        ("compact_0.2_refresh1", "gmt_0.2"),
        ("update_mask_0.2_refresh10", "gmt_0.2_refresh10"),
        ("sparse_adam_0.2_refresh10", "gmt_0.2_refresh10"),
        ("compact_0.2_refresh10", "gmt_0.2_refresh10"),
    ),
    "Is it enough that unselected weights stand still?": (
        ("gmt_0.2_momentum_reset", "sft"),
        ("update_mask_0.2", "sft"),
        ("update_mask_0.2_refresh10", "sft"),
        ("sparse_adam_0.2", "sft"),
        ("sparse_adam_0.2_refresh10", "sft"),
        ("sparse_adam_0.2", "gmt_0.2_momentum_reset"),
        ("compact_0.2_refresh1", "update_mask_0.2"),
        ("compact_0.2_refresh10", "update_mask_0.2_refresh10"),
        ("compact_0.2_refresh1", "sparse_adam_0.2"),
        ("compact_0.2_one_age_refresh1", "sparse_adam_0.2"),
        ("compact_0.2_refresh10", "sparse_adam_0.2_refresh10"),
    ),
    "Is it noise?": (
        ("sft_small_batch", "sft"),
        ("sft_beta2_0.95", "sft"),
        ("update_mask_0.2_scaled", "update_mask_0.2"),
    ),
    "Does the choice by the gradient matter?": (
        ("gmt_0.2", "rmt_0.2"),
        ("gmt_0.2_refresh10", "rmt_0.2_refresh10"),
        ("compact_0.2_refresh1", "compact_0.2_random_refresh1"),
        ("compact_0.2_refresh10", "compact_0.2_random"),
    ),
    "Does the age of each entry matter?": (
        ("compact_0.2_refresh1", "compact_0.2_one_age_refresh1"),
        ("compact_0.2_refresh10", "compact_0.2_one_age"),
    ),
}


def build() -> tuple[str, list[Figure]]:
    """A section with the table of all controls, their paired differences, and a figure.

    Returns:
        The Markdown, without the figure; and the figure. An empty text and no figure while there are no runs.
    """
    regimes = compare(SUITES, [method for group in GROUPS.values() for method in group])
    if not regimes:
        return "", []
    text = [
        "## Why: the controls of the village\n",
        "All masks have density 0.2. Numbers are means over seeds ± half of their 95% interval. The learning rate of "
        "each method is its own choice, from one grid; * marks one at the grid's edge.\n",
        _control_table(regimes),
        f"Differences are paired by seed, with their 95% interval, **bold** where it leaves out zero. "
        f"{_count_comparisons(regimes)}\n",
    ]
    for question, pairs in QUESTIONS.items():
        differences = _difference_table(regimes, pairs)
        text += [f"**{question}**\n", differences] if differences else []
    return "\n".join(text), [_figure(regimes)]


# ---------------------------------------------------------------------- tables


def _control_table(regimes: list[Compared]) -> str:
    measures = (ACCURACY, TEST_LOSS, FORGETTING, CHANGED)
    titles = ", ".join(regime.title for regime in regimes)
    head = ["method", f"lr: {titles}", "seeds"]
    head += [f"{measure.title}: {regime.title}" for measure in measures for regime in regimes]
    lines = [head]
    for name in (name for group in GROUPS.values() for name in group):
        if any(name in regime.methods for regime in regimes):
            cells = [load_method(name).title, ", ".join(_rate(regime, name) for regime in regimes)]
            cells += [", ".join(_seeds(regime, name) for regime in regimes)]
            cells += [
                mean(regime.estimate(name, measure), measure.digits) for measure in measures for regime in regimes
            ]
            lines.append(cells)
    return table(lines)


def _difference_table(regimes: list[Compared], pairs: tuple[tuple[str, str], ...]) -> str:
    measures = (ACCURACY, TEST_LOSS, FORGETTING)
    lines = [["paired difference of", *(f"{m.title}: {regime.title}" for m in measures for regime in regimes)]]
    for one, other in pairs:
        cells = [interval(regime.difference(one, other, m), m.digits) for m in measures for regime in regimes]
        if any(cells):
            lines.append([f"`{one}` - `{other}`", *cells])
    return table(lines) if len(lines) > 1 else ""


def _count_comparisons(regimes: list[Compared]) -> str:
    pairs = [pair for of_question in QUESTIONS.values() for pair in of_question]
    found = [
        difference
        for regime in regimes
        for pair in pairs
        for measure in (ACCURACY, TEST_LOSS, FORGETTING)
        if (difference := regime.difference(*pair, measure)) is not None
    ]
    bold = sum(difference.differs_from_zero for difference in found)
    return f"There are {len(found)} of them, {by_chance(len(found), bold)}"


def _rate(regime: Compared, name: str) -> str:
    if name not in regime.methods:
        return ""
    rate, ladder = regime.methods[name].learning_rate, regime.suite.choose["learning_rates"]
    return f"{rate:g}" + ("*" if rate in (float(ladder[0]), float(ladder[-1])) else "")


def _seeds(regime: Compared, name: str) -> str:
    return count(regime.methods[name].runs) if name in regime.methods else "0"


# ---------------------------------------------------------------------- figure


def _figure(regimes: list[Compared]) -> Figure:
    """Accuracy and forgetting of each control, in groups."""
    groups = {
        title: shown
        for title, group in GROUPS.items()
        if (shown := {name: label for name, label in group.items() if any(name in r.methods for r in regimes)})
    }
    labels: list[str] = []
    headings: list[int] = []
    places: dict[str, int] = {}
    for title, group in groups.items():
        headings.append(len(labels))
        labels.append(title)
        for name, label in group.items():
            places[name] = len(labels)
            labels.append(label)

    def draw(canvas) -> None:
        panels = canvas.subplots(1, 2, sharey=True)
        for axes, measure in zip(panels, (ACCURACY, FORGETTING), strict=True):
            for index, regime in enumerate(regimes):
                found = {name: regime.estimate(name, measure) for name in places}
                drawn = {name: one for name, one in found.items() if one is not None}
                axes.errorbar(
                    [one.mean for one in drawn.values()],
                    [places[name] + 0.26 * index - 0.13 for name in drawn],  # regimes beside each other
                    xerr=[one.half_width or 0 for one in drawn.values()],
                    fmt="os"[index],
                    markersize=3,
                    color=series_color(index),
                    label=f"{regime.title} data",
                    capsize=1.5,
                )
                if "sft" in drawn:
                    axes.axvline(drawn["sft"].mean, color=series_color(index), linestyle=":", linewidth=0.8)
            for place in headings:
                axes.axhspan(place - 0.5, place + 0.5, color=LIGHT["grid"], linewidth=0)
            axes.set_xlabel(measure.title)
            axes.tick_params(labelsize=7.5)
            axes.grid(visible=False, axis="y")
        panels[0].set_ylim(len(labels) - 0.4, -0.6)
        panels[0].set_yticks(range(len(labels)), labels)
        for place in headings:
            panels[0].get_yticklabels()[place].set(fontweight="bold", color=LIGHT["ink"])
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, handlelength=1.5)

    sentences = []
    for title, group in groups.items():
        of_group = [
            f"{label} {_both(regimes, name, ACCURACY)}% and {_both(regimes, name, FORGETTING)}"
            for name, label in group.items()
        ]
        sentences.append(f"{title}: {', '.join(of_group)}")
    names = " / ".join(regime.title for regime in regimes)
    return Figure(
        key="village_reasons",
        title="What zeros, noise and standing still do",
        note="Bars: 95% interval of the mean over seeds; dotted: SFT. Higher accuracy and less forgetting (rise of "
        "the loss on the pretraining text) are better. All masks have density 0.2.",
        alt=f"Accuracy and forgetting, with {names} data. {'; '.join(sentences)}.",
        draw=draw,
        height=50 + 15 * len(labels) + legend_height(len(regimes), 2),
    )


def _both(regimes: list[Compared], name: str, measure: Measure) -> str:
    means = [regime.estimate(name, measure) for regime in regimes]
    return " / ".join("-" if one is None else f"{one.mean:.{measure.digits}f}" for one in means)
