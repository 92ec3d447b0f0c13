"""The k-th largest magnitude from counts alone: on any device, without waiting for it, over any world size.

Level by level, entries are counted by the next few bits of their magnitude, beginning with the highest. The
counts say which digit the k-th largest has; only entries that share the digits found so far are counted at
the next level. Counts of shards add up, so a distributed caller sums them over the ranks in between:

    prefixes, ranks = start(ks, device)
    for level in LEVELS[dtype]:
        counts = magnitude_histograms(shards, prefixes, level)     # one row per tensor
        torch.distributed.all_reduce(counts)
        prefixes, ranks = descend(counts, prefixes, ranks)
    thresholds = from_bits(prefixes, dtype)

For scope "global" sum the rows, and give every tensor the same prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking.bits import blocks, magnitude_bits


class Level(NamedTuple):
    """One digit of the magnitude: ``bits`` bits, ``shift`` bits from the right."""

    shift: int
    bits: int


LEVELS: dict[torch.dtype, tuple[Level, ...]] = {
    torch.float32: (Level(20, 11), Level(10, 10), Level(0, 10)),
    torch.bfloat16: (Level(7, 8), Level(0, 7)),
    torch.float16: (Level(7, 8), Level(0, 7)),
}
_BLOCK = {"cpu": 1 << 18, "other": 1 << 23}  # entries counted at a time: bounds the passing memory


def magnitude_histogram(tensor: Tensor, prefix: Tensor | int, level: Level) -> Tensor:
    """Count the entries that share a prefix, by their next digit.

    Args:
        tensor: any shape and stride; float32, bfloat16 or float16.
        prefix: the digits above this level; 0 at the first level. An int or a 0-d integer tensor.
        level: which digit to count by.

    Returns:
        int64 tensor of ``2**level.bits`` counts, on the tensor's device.
    """
    shift, bits = level
    bins = 1 << bits
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=tensor.device)
    for block in blocks(tensor, _BLOCK["cpu" if tensor.device.type == "cpu" else "other"]):
        magnitude = magnitude_bits(block).reshape(-1).to(torch.int32)
        digit = (magnitude >> shift) & (bins - 1)
        # Entries with another prefix are counted in one bin more, which nobody reads.
        digit.masked_fill_((magnitude >> (shift + bits)) != prefix, bins)
        if tensor.device.type == "cpu":
            counts += torch.bincount(digit, minlength=bins + 1)
        else:  # bincount would wait for the device
            counts.scatter_add_(0, digit.long(), counts.new_ones(()).expand(digit.numel()))
    return counts[:bins]


def magnitude_histograms(tensors: Sequence[Tensor], prefixes: Tensor, level: Level) -> Tensor:
    """:func:`magnitude_histogram` of several tensors: int64, one row of counts each.

    Args:
        tensors: of one dtype, or widened to one by the caller.
        prefixes: integer tensor with one prefix per tensor.
        level: which digit to count by.
    """
    rows = [magnitude_histogram(t, prefix, level) for t, prefix in zip(tensors, prefixes, strict=True)]
    return torch.stack(rows)


def start(ks: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Prefixes and ranks before the first level, for the k of each row of counts."""
    ranks = torch.tensor(list(ks), dtype=torch.int64, device=device)
    return torch.zeros_like(ranks), ranks


def descend(counts: Tensor, prefixes: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """From the counts of a level to the next: find the digit that holds the ranked entry.

    Args:
        counts: int64 [rows, bins], summed over all ranks.
        prefixes: int64 [rows], the digits found so far.
        ranks: int64 [rows], the rank from the top (1 is the largest) among the entries with that prefix.

    Returns:
        Prefixes with one digit more, and ranks among the entries that share them.
    """
    at_least = counts.flip(1).cumsum(1)  # column i: entries in the i + 1 largest digits
    column = (at_least < ranks[:, None]).sum(1, keepdim=True)
    above = at_least.gather(1, column) - counts.flip(1).gather(1, column)
    digits = counts.shape[1] - 1 - column.squeeze(1)
    return prefixes * counts.shape[1] + digits, ranks - above.squeeze(1)


def kth_bits(read: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> Tensor:
    """Magnitude bits of the k-th largest entry of all tensors together, as a 0-d int64 tensor.

    Args:
        read: gives the tensors, all of ``dtype`` and on one device; called once for each level.
        k: rank from the top.
        dtype: of the tensors.
    """
    prefix: Any = 0
    rank: Any = k
    for level in LEVELS[dtype]:
        counts: Any = sum(magnitude_histogram(tensor, prefix, level) for tensor in read())
        prefixes, ranks = (torch.as_tensor(x, device=counts.device).view(1) for x in (prefix, rank))
        prefixes, ranks = descend(counts[None], prefixes, ranks)
        prefix, rank = prefixes[0], ranks[0]
    return prefix
