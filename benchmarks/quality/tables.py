"""Cells and tables in Markdown, and the results of a suite that methods are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.quality import results
from benchmarks.quality.experiment import load_method, load_suite
from benchmarks.quality.statistics import Estimate, estimate, paired_difference


@dataclass(frozen=True)
class Measure:
    """A number of a run: its title in tables, digits behind the point, and how it is read off.

    Attributes:
        of_run: function of a run and of the model before training.
    """

    title: str
    digits: int
    of_run: Callable[[dict, dict], float]


ACCURACY = Measure("accuracy, %", 1, lambda run, base: 100 * run["accuracy"])
TEST_LOSS = Measure("test loss", 3, lambda run, base: run["losses"]["test"])
FORGETTING = Measure("forgetting", 3, lambda run, base: _rise(run, base, next(iter(base["texts"]))))
CHANGED = Measure("weights changed, %", 0, lambda run, base: 100 * run["change"]["fraction_changed"])


def _rise(run: dict, base: dict, text: str) -> float:
    return run["texts"][text] - base["texts"][text]


def by_chance(found: int, marked: int) -> str:
    """What to say of a number of comparisons, of which so many leave out zero."""
    return (
        f"without a correction for their number: {marked:,} leave out zero, and about {found / 20:.0f} would by chance "
        "if nothing differed."
    )


@dataclass(frozen=True)
class Compared:
    """A suite's measured runs: learning rates by method, and runs by method and seed."""

    title: str
    ladder: tuple[float, ...]
    base: dict
    rates: dict[str, float]
    runs: dict[str, dict[int, dict]]

    def values(self, method: str, measure: Measure) -> dict[int, float]:
        """By seed, of the runs that did not diverge."""
        runs = self.runs.get(method, {})
        return {seed: measure.of_run(run, self.base) for seed, run in runs.items() if not run["failed"]}

    def estimate(self, method: str, measure: Measure) -> Estimate | None:
        """The mean over seeds; None without a run."""
        values = self.values(method, measure)
        return estimate(list(values.values())) if values else None

    def difference(self, method: str, other: str, measure: Measure) -> Estimate | None:
        """The first minus the second, seed by seed; None without a seed that both have."""
        return paired_difference(self.values(method, measure), self.values(other, measure))


def compare(titles: Mapping[str, str], methods: list[str]) -> list[Compared]:
    """The suites, by name with a title for columns, that have runs of these methods."""
    found = []
    for name, title in titles.items():
        suite, rates, runs = load_suite(name), {}, {}
        base = results.read(f"{name}/base/measure_lr0_seed0")
        for method in map(load_method, methods):
            if of_method := results.measured(suite, method):
                runs[method.name], rates[method.name] = of_method, results.chosen_learning_rate(suite, method)
        if base is not None and runs:
            found.append(Compared(title, tuple(map(float, suite.choose["learning_rates"])), base, rates, runs))
    return found


def table(lines: list[list[str]], *, text: tuple[int, ...] = (0,)) -> str:
    """Rows of cells, the first of them the head; columns are numbers but for those of ``text``."""
    rule = ["---:"] * len(lines[0])
    for column in text:
        rule[column] = "---"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *lines[1:]]) + "\n"


def count(runs: Mapping[int, dict]) -> str:
    """How many runs, and how many of them diverged."""
    failed = sum(run["failed"] is not None for run in runs.values())
    return f"{len(runs)}" + (f" ({failed} diverged)" if failed else "")


def mean(found: Estimate | None, digits: int) -> str:
    """A mean with half of its 95% interval, or with the number of seeds where two or one give none."""
    if found is None:
        return ""
    if found.half_width is None:
        return f"{found.mean:.{digits}f} ({_seeds(found)})"
    return f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"


def interval(found: Estimate | None, digits: int) -> str:
    """A difference with its 95% interval, bold where that leaves out zero."""
    if found is None:
        return ""
    if found.half_width is None:
        return f"{found.mean:+.{digits}f} ({_seeds(found)})"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    text = f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if found.differs_from_zero else text


def _seeds(found: Estimate) -> str:
    return f"{found.count} seed{'s' if found.count > 1 else ''}"
