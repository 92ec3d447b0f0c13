"""Means with their spread, and paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Estimate(NamedTuple):
    """A mean of ``count`` values, their standard deviation, and half the width of the mean's 95% interval.

    ``sd`` is None for a single value: it has no spread. ``half_width`` is None for fewer than three values: two can
    agree by chance, and their interval would then have no width.
    """

    mean: float
    sd: float | None
    half_width: float | None
    count: int

    @property
    def differs_from_zero(self) -> bool:
        """Whether the 95% interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and Student's 95% interval of independent values.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("there is no value to estimate from")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    sd = statistics.stdev(values)
    if len(values) == 2:
        return Estimate(mean, sd, None, 2)
    return Estimate(mean, sd, t95(len(values) - 1) * sd / math.sqrt(len(values)), len(values))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """``values`` minus ``baseline`` over the seeds that both have; None if there is none."""
    seeds = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in seeds]) if seeds else None


def t95(degrees_of_freedom: int) -> float:
    """Two-sided 95% quantile of Student's t; beyond 30 degrees of freedom that of 30, which is slightly wide."""
    return _T95[min(degrees_of_freedom, len(_T95)) - 1]
