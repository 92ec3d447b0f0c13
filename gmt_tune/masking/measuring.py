"""The measuring step: the k-th largest score of each tensor, or of all tensors together.

Changes nothing and keeps nothing. How the k-th largest is found depends on the device; see ``selection``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking import cpu_search
from gmt_tune.masking.bits import blocks, from_bits
from gmt_tune.masking.checks import check_dtype, nonfinite_flags
from gmt_tune.masking.devices import load_triton_search, triton_search_for, try_triton
from gmt_tune.masking.histogram import kth_bits
from gmt_tune.masking.saliency import Saliency

_BLOCK = 1 << 21  # entries that are read at a time where neither the CPU's search nor the kernels serve


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
    return _measure_sets([[tensor]], [k])[0].threshold


def measure(scores: Sequence[Tensor | Saliency], density: float, scope: str = "tensor") -> Measurement:
    """The k-th largest magnitude of each tensor, or of all together, and what is learnt on the way.

    On CUDA it does not wait for the device.

    Args:
        scores: tensors of any shape, or saliencies; their magnitudes rank the entries.
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
    ks = [entries_to_keep(sum(s.numel() for s in one), density) for one in sets]
    for group, found in zip(groups, _measure_sets(sets, ks), strict=True):
        for i, flag in zip(group, found.nonfinite, strict=True):
            thresholds[i] = found.threshold.to(scores[i].device)
            selected[i] = found.selected if len(group) == 1 else None
            nonfinite[i] = flag
    return Measurement(thresholds, selected, nonfinite)


def measure_thresholds(scores: Sequence[Tensor | Saliency], density: float, scope: str = "tensor") -> list[Tensor]:
    """The thresholds alone; see :func:`measure`."""
    return measure(scores, density, scope).thresholds


class _Found(NamedTuple):
    """Of one set: its threshold, how many entries are selected (if known), and for each tensor the flag."""

    threshold: Tensor
    selected: Tensor | None
    nonfinite: list[Tensor]


def _measure_sets(sets: Sequence[Sequence[Tensor | Saliency]], ks: Sequence[int]) -> list[_Found]:
    """The k-th largest magnitude of each set, none of them empty, in the way that its device is fastest at."""
    found: dict[int, _Found] = {}
    by_kernels, on_cpu = [], []
    for i, one in enumerate(sets):
        if (triton_search := triton_search_for(one)) is not None and triton_search.can_search(one):
            by_kernels.append(i)
        elif all(score.device.type == "cpu" for score in one):
            on_cpu.append(i)
    for members, measure_some in ((by_kernels, _measure_by_kernels), (on_cpu, _measure_on_cpu)):
        if not members:
            continue
        some = measure_some([sets[i] for i in members], [ks[i] for i in members])
        if some is not None:
            found.update(zip(members, some, strict=True))
    return [found[i] if i in found else _measure_by_digits(sets[i], ks[i]) for i in range(len(sets))]


def _measure_on_cpu(sets: Sequence[Sequence[Tensor | Saliency]], ks: Sequence[int]) -> list[_Found]:
    ranks = cpu_search.kth_largest(sets, ks)
    thresholds: list[Tensor] = [torch.empty(0)] * len(sets)
    dtypes = [_common_dtype(one) for one in sets]
    for dtype in set(dtypes):
        members = [i for i, d in enumerate(dtypes) if d == dtype]
        for i, value in zip(members, from_bits(torch.tensor([ranks[i].bits for i in members]), dtype), strict=True):
            thresholds[i] = value
    counts = torch.tensor([rank.selected for rank in ranks], dtype=torch.int64).unbind()
    flags = torch.tensor([rank.nonfinite for rank in ranks], dtype=torch.bool).unbind()
    return [
        # Which of several tensors it was, the search does not tell
        _Found(threshold, count, [flag] * len(one) if len(one) == 1 or not flag else _nonfinite_flags(one))
        for one, threshold, count, flag in zip(sets, thresholds, counts, flags, strict=True)
    ]


def _measure_by_kernels(sets: Sequence[Sequence[Tensor | Saliency]], ks: Sequence[int]) -> list[_Found] | None:
    triton_search = load_triton_search()
    assert triton_search is not None  # such sets are only made where it is there
    measured = try_triton(triton_search.kth_largest, sets, ks)
    if measured is None:
        return None
    thresholds, nonfinite = measured
    return [_Found(threshold, None, flags) for threshold, flags in zip(thresholds, nonfinite, strict=True)]


def _measure_by_digits(one: Sequence[Tensor | Saliency], k: int) -> _Found:
    dtype, device = _common_dtype(one), one[0].device

    def read() -> Iterator[Tensor]:
        for score in one:
            for block in _blocks(score):
                yield block.to(device, dtype)

    return _Found(from_bits(kth_bits(read, k, dtype), dtype), None, _nonfinite_flags(one))


def _blocks(score: Tensor | Saliency) -> Iterator[Tensor]:
    return score.blocks(_BLOCK) if isinstance(score, Saliency) else blocks(score, _BLOCK)


def _nonfinite_flags(scores: Sequence[Tensor | Saliency]) -> list[Tensor]:
    return [torch.stack(nonfinite_flags(list(_blocks(score)))).any() for score in scores]


def _common_dtype(scores: Sequence[Tensor | Saliency]) -> torch.dtype:
    dtypes = {score.dtype for score in scores}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
