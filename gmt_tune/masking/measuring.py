"""The measuring step: the k-th largest score of each tensor, or of all tensors together.

Changes nothing and keeps nothing. How the k-th largest is found depends on the device; see ``selection``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking import cpu_search
from gmt_tune.masking.bits import from_bits
from gmt_tune.masking.checks import check_dtype, nonfinite_flags
from gmt_tune.masking.histogram import kth_bits


class Measurement(NamedTuple):
    """What :func:`measure` found; one 0-d tensor per tensor in each list, on its device.

    Attributes:
        thresholds: the k-th largest magnitudes.
        selected: how many entries reach the threshold and are not zero; None where only applying it tells.
        nonfinite: whether the tensor holds NaN or infinity.
    """

    thresholds: list[Tensor]
    selected: list[Tensor | None]
    nonfinite: list[Tensor]


def entries_to_keep(n: int, density: float) -> int:
    """k of n entries: ``max(1, floor(density * n))``, the product rounded to double as Python does."""
    return max(1, math.floor(density * n))


def kth_largest_magnitude(tensor: Tensor, k: int) -> Tensor:
    """The k-th largest absolute value of a tensor, equal to what a full sort gives, bit for bit.

    Args:
        tensor: any shape and stride; float32, bfloat16 or float16.
        k: rank from the top, 1 (the largest) to ``tensor.numel()``.

    Returns:
        0-d tensor of the tensor's dtype, on its device. NaN ranks above infinity, as in ``torch.sort``.

    Raises:
        ValueError: if k is outside 1..numel.
        TypeError: if the dtype is not float32, bfloat16 or float16.
    """
    check_dtype(tensor)
    if not 1 <= k <= tensor.numel():
        raise ValueError(f"k must be between 1 and the number of entries ({tensor.numel()}), got {k}")
    return _measure_sets([[tensor]], [k]).thresholds[0]


def measure(scores: Sequence[Tensor], density: float, scope: str = "tensor") -> Measurement:
    """The k-th largest magnitude of each tensor, or of all together, and what is learnt on the way.

    On CUDA it does not wait for the device.

    Args:
        scores: tensors of any shape; their magnitudes rank the entries.
        density: fraction of entries that stay, in (0, 1].
        scope: "tensor" or "global".

    Returns:
        A threshold for each tensor, infinity for one without entries. With scope "global" they are equal, and of
        the tensors' dtype, or float32 where dtypes differ.
    """
    for score in scores:
        check_dtype(score)
    filled = [i for i, score in enumerate(scores) if score.numel()]
    thresholds = [torch.full((), math.inf, dtype=s.dtype, device=s.device) for s in scores]
    selected: list[Tensor | None] = [torch.zeros((), dtype=torch.int64, device=s.device) for s in scores]
    nonfinite = [torch.zeros((), dtype=torch.bool, device=s.device) for s in scores]
    if scope == "global":
        groups = [filled] if filled else []
    else:
        groups = [[i] for i in filled]
    sets = [[scores[i] for i in group] for group in groups]
    found = _measure_sets(sets, [entries_to_keep(sum(s.numel() for s in one), density) for one in sets])
    for group, threshold, count, bad in zip(groups, *found, strict=True):
        flags = [bad] if len(group) == 1 else _flags_of_each([scores[i] for i in group], bad)
        for i, flag in zip(group, flags, strict=True):
            thresholds[i] = threshold.to(scores[i].device)
            selected[i] = count if len(group) == 1 else None
            nonfinite[i] = flag
    return Measurement(thresholds, selected, nonfinite)


def measure_thresholds(scores: Sequence[Tensor], density: float, scope: str = "tensor") -> list[Tensor]:
    """The thresholds alone; see :func:`measure`."""
    return measure(scores, density, scope).thresholds


def measure_blocks(read: Callable[[], Iterable[Tensor]], n: int, density: float, dtype: torch.dtype) -> Tensor:
    """The threshold of scores that are never alive together: made again, block by block, for each digit.

    Args:
        read: gives the scores in blocks, all of ``dtype`` and on one device; called two or three times.
        n: how many entries there are, at least one.
        density: fraction of entries that stay, in (0, 1].
        dtype: of the scores.
    """
    return from_bits(kth_bits(read, entries_to_keep(n, density), dtype), dtype)


def _measure_sets(sets: Sequence[Sequence[Tensor]], ks: Sequence[int]) -> Measurement:
    """The k-th largest magnitude of each set of tensors, none of them empty."""
    if all(t.device.type == "cpu" for tensors in sets for t in tensors):
        return _measure_on_cpu(sets, ks)
    thresholds, nonfinite = [], []
    for tensors, k in zip(sets, ks, strict=True):
        dtype = tensors[0].dtype if all(t.dtype == tensors[0].dtype for t in tensors) else torch.float32
        thresholds.append(from_bits(kth_bits(lambda t=tensors, d=dtype: (x.to(d) for x in t), k, dtype), dtype))
        nonfinite.append(torch.stack([f.to(tensors[0].device) for f in nonfinite_flags(tensors)]).any())
    return Measurement(thresholds, [None] * len(sets), nonfinite)


def _measure_on_cpu(sets: Sequence[Sequence[Tensor]], ks: Sequence[int]) -> Measurement:
    ranks = cpu_search.kth_largest(sets, ks)
    dtypes = [one[0].dtype if len({t.dtype for t in one}) == 1 else torch.float32 for one in sets]
    thresholds: list[Tensor] = [torch.empty(0)] * len(sets)
    for dtype in set(dtypes):
        members = [i for i, d in enumerate(dtypes) if d == dtype]
        for i, value in zip(members, from_bits(torch.tensor([ranks[i].bits for i in members]), dtype), strict=True):
            thresholds[i] = value
    selected = torch.tensor([rank.selected for rank in ranks], dtype=torch.int64)
    nonfinite = torch.tensor([rank.nonfinite for rank in ranks], dtype=torch.bool)
    return Measurement(thresholds, list(selected.unbind()), list(nonfinite.unbind()))


def _flags_of_each(tensors: Sequence[Tensor], any_of_them: Tensor) -> list[Tensor]:
    if any_of_them.device.type == "cpu" and not any_of_them:  # reading it waits for nothing
        return [any_of_them] * len(tensors)
    return nonfinite_flags(tensors)
