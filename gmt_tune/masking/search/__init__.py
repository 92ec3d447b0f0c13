"""Exact thresholds without sorting, at about the speed of memory: the k-th largest magnitude of sets of entries.

Why it is exact: the magnitude of an IEEE float orders like the integer of its bits without the sign. The threshold is
therefore the one integer t with #(bits > t) < k <= #(bits >= t), and counting proves it; nothing is rounded, sorted or
copied. NaN ranks above infinity. Which t to count for is the only question, and the answer differs:

- on the CPU, a sample guesses t, and a few counts correct the guess (``cpu``);
- on a GPU with Triton, the same for all tensors in a few launches (``triton``);
- where tensors are sharded, where their memory has gaps, and elsewhere, digit by digit (``digits``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.bits import from_bits
from gmt_tune.masking.checks import check_dtype
from gmt_tune.masking.nonfinite import nonfinite_flags
from gmt_tune.masking.search import cpu, digits
from gmt_tune.masking.search.devices import kernels_for, try_triton
from gmt_tune.masking.search.entries import Product, read_blocks
from gmt_tune.masking.search.found import Found, Set, common_dtype

_BLOCK = 1 << 21  # entries that are looked at together for NaN


def find_thresholds(sets: Sequence[Set], ks: Sequence[int]) -> list[Found]:
    """The k-th largest magnitude of each set, in the way that its device is fastest at.

    On CUDA it does not wait for the device.

    Args:
        sets: none without entries; where sharded, all ranks give the same sets in the same order.
        ks: for each set the rank from the top, 1 (the largest) to its number of entries.

    Raises:
        TypeError: if scores are sparse or of another dtype than float32, bfloat16 or float16.
    """
    searches: dict[Callable, list[int]] = {digits.find_thresholds: [], _search_by_kernels: [], _search_on_cpu: []}
    for i, one in enumerate(sets):
        for score, _ in one:
            check_dtype(score)
        searches[_search_for(one)].append(i)
    found: list[Any] = [None] * len(sets)
    for search, members in searches.items():
        if members:
            for i, result in zip(members, search([sets[i] for i in members], [ks[i] for i in members]), strict=True):
                found[i] = result
    return found


def _search_for(one: Set) -> Callable[[Sequence[Set], Sequence[int]], list[Found]]:
    scores = [score for score, _ in one]
    if any([part.groups for _, part in one]):
        return digits.find_thresholds
    kernels = kernels_for(scores)
    if kernels is not None and kernels.can_search(scores, common_dtype(one)):
        return _search_by_kernels
    return _search_on_cpu if all(score.device.type == "cpu" for score in scores) else digits.find_thresholds


def _search_on_cpu(sets: Sequence[Set], ks: Sequence[int]) -> list[Found]:
    ranks = cpu.kth_largest([[score for score, _ in one] for one in sets], ks)
    dtypes = [common_dtype(one) for one in sets]
    thresholds: dict[int, Tensor] = {}
    for dtype in set(dtypes):
        members = [i for i, d in enumerate(dtypes) if d == dtype]
        values = from_bits(torch.tensor([ranks[i].bits for i in members], device="cpu"), dtype).unbind()
        thresholds.update(zip(members, values, strict=True))
    counts = torch.tensor([rank.selected for rank in ranks], dtype=torch.int64, device="cpu").unbind()
    flags = torch.tensor([rank.nonfinite for rank in ranks], dtype=torch.bool, device="cpu").unbind()
    found = []
    for i, one in enumerate(sets):
        if len(one) == 1:
            found.append(Found(thresholds[i], [counts[i]], [flags[i]]))
        else:  # which of several tensors is not finite, the search has not seen
            is_bad = [_holds_nonfinite(score) if ranks[i].nonfinite else flags[i] for score, _ in one]
            found.append(Found(thresholds[i], [None] * len(one), is_bad))
    return found


def _holds_nonfinite(score: Tensor | Product) -> Tensor:
    return torch.stack(nonfinite_flags(list(read_blocks(score, _BLOCK)))).any()


def _search_by_kernels(sets: Sequence[Set], ks: Sequence[int]) -> list[Found]:
    scores = [[score for score, _ in one] for one in sets]
    kernels = kernels_for(scores[0])
    found = None if kernels is None else try_triton(kernels.kth_largest, scores, ks)
    if found is None:
        return digits.find_thresholds(sets, ks)
    return [Found(threshold, [None] * len(flags), flags, search) for threshold, flags, search in found]
