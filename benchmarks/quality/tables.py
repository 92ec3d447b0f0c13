"""Cells and tables in Markdown, and the results of a suite that methods are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality import results
from benchmarks.quality.experiment import Method, Suite, load_method, load_suite
from benchmarks.quality.statistics import Estimate, estimate, paired_difference


@dataclass(frozen=True)
class Measure:
    """A number of a run: its title in tables, digits behind the point, and how it is read off.

    Attributes:
        of_run: function of a run and of the model before training; None where the run has no such number.
    """

    title: str
    digits: int
    of_run: Callable[[dict, dict], float | None]


def forgetting(text: str, title: str = "forgetting") -> Measure:
    """How much the loss on the text of that name rose."""
    return Measure(title, 3, lambda run, base: run["texts"][text] - base["texts"][text])


ACCURACY = Measure("accuracy, %", 1, lambda run, base: 100 * run["accuracy"])
TEST_LOSS = Measure("test loss", 3, lambda run, base: run["losses"]["test"])
FORGETTING = Measure("forgetting", 3, lambda run, base: forgetting(next(iter(base["texts"]))).of_run(run, base))
CHANGED = Measure("weights changed, %", 0, lambda run, base: 100 * run["change"]["fraction_changed"])


def by_chance(found: int, marked: int) -> str:
    """What to say of a number of comparisons, of which so many leave out zero."""
    return (
        f"without a correction for their number: {marked:,} leave out zero, and about {found / 20:.0f} would by chance "
        "if nothing differed."
    )


@dataclass(frozen=True)
class Measured:
    """A method's measured runs at one learning rate, by seed, and the model before training."""

    method: Method
    learning_rate: float
    runs: dict[int, dict]
    base: dict

    def values(self, measure: Measure) -> dict[int, float]:
        """By seed, of the runs that did not diverge and have the number."""
        found = {seed: measure.of_run(run, self.base) for seed, run in self.runs.items() if not run["failed"]}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, measure: Measure) -> Estimate | None:
        """The mean over seeds; None without a run that has the number."""
        values = self.values(measure)
        return estimate(list(values.values())) if values else None

    def minus(self, other: Measured, measure: Measure) -> Estimate | None:
        """The difference seed by seed; None without a seed that both have."""
        return paired_difference(self.values(measure), other.values(measure))


@dataclass(frozen=True)
class Compared:
    """A suite's methods by name, in the order asked for, and the model before training."""

    suite: Suite
    title: str
    base: dict
    methods: dict[str, Measured]

    def estimate(self, method: str, measure: Measure) -> Estimate | None:
        """The mean over seeds; None without a run."""
        return self.methods[method].estimate(measure) if method in self.methods else None

    def difference(self, method: str, other: str, measure: Measure) -> Estimate | None:
        """The first minus the second, seed by seed; None without a seed that both have."""
        both = [self.methods.get(name) for name in (method, other)]
        return both[0].minus(both[1], measure) if all(both) else None


def compare(titles: Mapping[str, str], methods: Sequence[str] | None = None) -> list[Compared]:
    """The suites, by name with a title, that have runs of these methods or, without a list, of their own."""
    found = []
    for name, title in titles.items():
        suite, base, of_suite = load_suite(name), results.read(f"{name}/base/measure_lr0_seed0"), {}
        for method in map(load_method, suite.methods if methods is None else methods):
            if base is not None and (runs := results.measured(suite, method)):
                of_suite[method.name] = Measured(method, results.chosen_learning_rate(suite, method), runs, base)
        if of_suite:
            found.append(Compared(suite, title, base, of_suite))
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
