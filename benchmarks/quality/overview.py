"""The tables of ``docs/results.md``: what to use, and each claim of the paper, from the results on disk alone."""

from __future__ import annotations

from benchmarks.quality import results
from benchmarks.quality.experiment import load_method
from benchmarks.quality.tables import (
    ACCURACY,
    FORGETTING,
    TEST_LOSS,
    Compared,
    Measure,
    by_chance,
    compare,
    interval,
    mean,
    table,
)

PAGE = results.RESULTS.parent / "results.md"
# How columns call a suite, and the number that says how well its task is done.
TASKS = {
    "reviews_cpu": ("film reviews", ACCURACY),
    "gsm8k_cpu": ("GSM8K, 60 steps", TEST_LOSS),
    "gsm8k_small_cpu": ("GSM8K, 64 problems", TEST_LOSS),
    "functions_cpu": ("functions", TEST_LOSS),
    "village_ample": ("village, ample data", ACCURACY),
    "village_small": ("village, little data", ACCURACY),
}
METHODS = [
    "sft", "lora", "gmt_0.2", "rmt_0.2", "compact_0.2_random", "compact_0.2_refresh10", "compact_0.1_refresh10",
    "compact_0.05_refresh10",
]  # fmt: skip
_MASK, _COMPACT = "mask with AdamW", "compact"
# A claim of the paper, and the pairs of methods that it is about: the first is said to be better than the second.
CLAIMS = {
    "better than full fine-tuning": (
        (f"{_MASK}, every step", "gmt_0.2", "sft"),
        (f"{_MASK}, every 10 steps", "gmt_0.2_refresh10", "sft"),
        (f"{_COMPACT}, every 10 steps", "compact_0.2_refresh10", "sft"),
    ),
    "better than a random selection": (
        (f"{_MASK}, every step", "gmt_0.2", "rmt_0.2"),
        (f"{_COMPACT}, every 10 steps", "compact_0.2_refresh10", "compact_0.2_random"),
    ),
    "selecting again is better": (
        (f"{_MASK}: every step, or once", "gmt_0.2", "oneoff_0.2"),
        (f"{_COMPACT}: every 10 steps, or every 30", "compact_0.2_refresh10", "compact_0.2_refresh30"),
    ),
    "better than half fine-tuning": (
        (f"{_MASK}, every step", "gmt_0.2", "half"),
        (f"{_COMPACT}, every 10 steps", "compact_0.2_refresh10", "half"),
    ),
    "better than LoRA": (
        (f"{_MASK}, every step", "gmt_0.2", "lora"),
        (f"{_COMPACT}, every 10 steps", "compact_0.2_refresh10", "lora"),
    ),
    "the ratio hardly matters": (
        (f"{_MASK}: 0.05 or 0.2", "gmt_0.05", "gmt_0.2"),
        (f"{_COMPACT}: 0.05 or 0.2", "compact_0.05_refresh10", "compact_0.2_refresh10"),
    ),
}


def write() -> None:
    """Put the tables between their marks in the page; all else of it stays."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in (("summary", build_summary()), ("claims", build_claims())):
        start, end = f"<!-- python -m benchmarks.quality table: {name} -->\n", "<!-- end -->\n"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{made}{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


def build_summary() -> str:
    """The methods that people choose between on every task, in Markdown: mean and 95% interval over seeds."""
    columns = [(task, measure) for task, of_task in _tasks(METHODS) for measure in (of_task, FORGETTING)]
    lines = [["method", *(f"{task.title}: {measure.title}" for task, measure in columns)]]
    for name in METHODS:
        cells = [mean(task.estimate(name, measure), measure.digits) for task, measure in columns]
        lines.append([load_method(name).title, *cells])
    before = [f"{measure.of_run(task.base, task.base):.{measure.digits}f}" for task, measure in columns]
    return table([*lines, ["before training", *before]])


def build_claims() -> str:
    """Each claim's differences on every task, in Markdown, and how many they are."""
    pairs = [pair for of_claim in CLAIMS.values() for pair in of_claim]
    tasks = _tasks([name for _, *both in pairs for name in both])
    lines = [["claim", "with", *(f"{task.title}: {measure.title}" for task, measure in tasks)]]
    for claim, of_claim in CLAIMS.items():
        for number, (label, one, other) in enumerate(of_claim):
            cells = [interval(task.difference(one, other, measure), measure.digits) for task, measure in tasks]
            lines.append([claim if number == 0 else "", label, *cells])
    found = [d for task, measure in tasks for _, *both in pairs if (d := task.difference(*both, measure)) is not None]
    marked = sum(difference.differs_from_zero for difference in found)
    return table(lines, text=(0, 1)) + f"\nThese are {len(found)} comparisons, {by_chance(len(found), marked)}\n"


def _tasks(methods: list[str]) -> list[tuple[Compared, Measure]]:
    measures = {title: measure for title, measure in TASKS.values()}
    found = compare({name: title for name, (title, _) in TASKS.items()}, list(dict.fromkeys(methods)))
    return [(task, measures[task.title]) for task in found if len(task.methods) > 1]  # one method is no comparison
