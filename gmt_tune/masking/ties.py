"""Selections of exactly k entries: of those that tie at the threshold, the ones with the lowest index stay.

Buffers of what is selected then keep their size from one selection to the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmt_tune.masking.bits import magnitude_bits
from gmt_tune.masking.packing import pack_selection
from gmt_tune.masking.parts import Part, sum_counts, sum_over_ranks
from gmt_tune.masking.places import Places
from gmt_tune.masking.scores import entries_to_keep
from gmt_tune.masking.selection import PlacedSelection, Selection, ThresholdSelection, pack

_DIGIT = 1 << 16  # an index is looked for in steps of so many


@torch.no_grad()
def place_exactly(
    parts: Sequence[Part], selections: Sequence[Selection], thresholds: Sequence[Tensor | None], density: float
) -> tuple[list[PlacedSelection], list[Tensor]]:
    """Selections without the ties that are too many, kept by the places of their entries. Waits for the device.

    Args:
        parts: of gradients; all ranks give the same ones.
        selections: of each, as scores make them. Those that rank nothing are kept as they are.
        thresholds: that each will show.
        density: of which k follows; fewer than k are selected where fewer entries are not zero.

    Returns:
        The selections, and how many entries of each whole gradient they have, 0-d int64.
    """
    bits = [selection.bits for selection in pack(selections, thresholds)]
    own = [Places(each, part.local.numel()) for each, part in zip(bits, parts, strict=True)]
    counts = sum_counts([_number(places.count, part) for places, part in zip(own, parts, strict=True)], parts)
    surplus = [int(count) - entries_to_keep(part.numel, density) for count, part in zip(counts, parts, strict=True)]
    tied = [i for i, n in enumerate(surplus) if n > 0 and isinstance(selections[i], ThresholdSelection)]
    kept = _keep_lowest([parts[i] for i in tied], [selections[i] for i in tied], [surplus[i] for i in tied])
    for i, (index, stays) in zip(tied, kept, strict=True):
        dropped = index[~stays]
        # Each is set, so subtracting clears it; bytes wrap
        bits[i].index_add_(0, dropped >> 3, (256 - (1 << (dropped & 7))).to(torch.uint8))
        own[i] = Places(bits[i], parts[i].local.numel())
        counts[i] = counts[i] - surplus[i]
    placed = [
        PlacedSelection(places, part.local.shape, threshold)
        for places, part, threshold in zip(own, parts, thresholds, strict=True)
    ]
    return placed, counts


def _keep_lowest(
    parts: Sequence[Part], selections: Sequence[Selection], surplus: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Of each part the flat indices of what ties in it, and which of these stay."""
    ties = [_ties(selection, part) for selection, part in zip(selections, parts, strict=True)]
    whole = [_index_in_whole(index, part) for index, part in zip(ties, parts, strict=True)]
    totals = sum_counts([_number(index.numel(), part) for index, part in zip(ties, parts, strict=True)], parts)
    left = [int(total) - n for total, n in zip(totals, surplus, strict=True)]
    # The index of the last one that stays, digit by digit, as thresholds are found
    last = [0] * len(parts)
    for size in (_DIGIT * _DIGIT, _DIGIT, 1):
        rows = []
        for index, part, base in zip(whole, parts, last, strict=True):
            digits = min(_DIGIT, -(-part.numel // size))
            within = index[(index >= base) & (index < base + digits * size)] - base
            rows.append(torch.bincount(within // size, minlength=digits))
        for i, row in enumerate(sum_over_ranks(rows, parts)):
            reached = row.cumsum(0)
            digit = int((reached < left[i]).sum())
            left[i] -= int(reached[digit - 1]) if digit else 0
            last[i] += digit * size
    return [(index, at <= end) for index, at, end in zip(ties, whole, last, strict=True)]


def _ties(selection: Selection, part: Part) -> Tensor:
    """Flat indices, among the entries that this process holds, of those that are at the threshold."""
    assert isinstance(selection, ThresholdSelection)
    smallest = selection.smallest()
    bits = pack_selection(selection.score, lambda block: magnitude_bits(block) == smallest)
    found = [index for _, _, index in Places(bits, part.local.numel()).chunks()]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=part.local.device)


def _index_in_whole(index: Tensor, part: Part) -> Tensor:
    """Flat indices in the whole gradient of entries that are given by those in this process's part."""
    if not part.groups or not part.local.dim():
        return index
    coordinates = torch.unravel_index(index, part.local.shape)
    whole = torch.zeros_like(index)
    for size, (first, _), coordinate in zip(part.grad.shape, part.ranges(), coordinates, strict=True):
        whole = whole * size + coordinate + first
    return whole


def _number(value: int, part: Part) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=part.local.device)
