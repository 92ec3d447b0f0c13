"""Selections of exactly k entries: of those that tie at the threshold, the ones with the lowest index stay.

Buffers of what is selected then keep their size from one selection to the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmt_tune.masking.parts import Part, sum_counts, sum_over_ranks
from gmt_tune.masking.places import Places
from gmt_tune.masking.scores import entries_to_keep
from gmt_tune.masking.search.entries import Product
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
    at_once = [_place_at_once(*each, density) for each in zip(parts, selections, strict=True)]
    rest = [i for i, places in enumerate(at_once) if places is None]
    packed = dict(zip(rest, pack([selections[i] for i in rest], [thresholds[i] for i in rest]), strict=True))
    own = [each or Places(packed[i].bits, parts[i].local.numel()) for i, each in enumerate(at_once)]
    counts = sum_counts([_number(places.count, part) for places, part in zip(own, parts, strict=True)], parts)
    surplus = [int(count) - entries_to_keep(part.numel, density) for count, part in zip(counts, parts, strict=True)]
    tied = [i for i, n in enumerate(surplus) if n > 0 and isinstance(selections[i], ThresholdSelection)]
    ties = [_ties(selections[i], own[i]) for i in tied]
    dropped = _drop_highest([parts[i] for i in tied], ties, [surplus[i] for i in tied])
    for i, (at, index) in zip(tied, dropped, strict=True):
        own[i].drop_(at, index)
        counts[i] = counts[i] - surplus[i]
    placed = [
        PlacedSelection(places, part.local.shape, threshold)
        for places, part, threshold in zip(own, parts, thresholds, strict=True)
    ]
    return placed, counts


def _place_at_once(part: Part, selection: Selection, density: float) -> Places | None:
    """Exactly k entries, where C++ serves and this process has the whole score."""
    if part.groups or type(selection) is not ThresholdSelection or not isinstance(selection.score, Tensor):
        return None
    return Places.of_largest(selection.score, int(selection.smallest()), entries_to_keep(part.numel, density))


def _drop_highest(
    parts: Sequence[Part], ties: Sequence[tuple[Tensor, Tensor]], surplus: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Of what ties in each part, as :func:`_ties` gives it, the entries that are too many, in the same form."""
    shared = [i for i, part in enumerate(parts) if part.groups]
    ends = dict(zip(shared, _last_kept(shared, parts, ties, surplus), strict=True))
    dropped = []
    for i, (at, index) in enumerate(ties):
        # Entries are in order: where this process has all, the last ones go
        rest = _index_in_whole(index, parts[i]) > ends[i] if i in ends else slice(index.numel() - surplus[i], None)
        dropped.append((at[rest], index[rest]))
    return dropped


def _last_kept(
    members: Sequence[int], parts: Sequence[Part], ties: Sequence[tuple[Tensor, Tensor]], surplus: Sequence[int]
) -> list[int]:
    """Of parts whose other entries are on other ranks, the index in the whole of the last tie that stays."""
    parts, surplus = [parts[i] for i in members], [surplus[i] for i in members]
    whole = [_index_in_whole(ties[i][1], part) for i, part in zip(members, parts, strict=True)]
    totals = sum_counts([_number(index.numel(), part) for index, part in zip(whole, parts, strict=True)], parts)
    left = [int(total) - n for total, n in zip(totals, surplus, strict=True)]
    # Digit by digit, as thresholds are found
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
    return last


def _ties(selection: Selection, places: Places) -> tuple[Tensor, Tensor]:
    """Which of the selected entries of this process are at the threshold, and their flat indices."""
    assert isinstance(selection, ThresholdSelection)
    score = selection.score
    values = score.read(places.gather) if isinstance(score, Product) else places.gather(score)
    return places.find(values, selection.smallest())


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
