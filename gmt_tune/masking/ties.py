"""Selections of exactly k entries: of those that tie at the threshold, the ones with the lowest index stay.

Buffers of what is selected then keep their size from one selection to the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gmt_tune.masking.parts import Part, sum_counts, sum_over_ranks
from gmt_tune.masking.places import RUN, SEGMENT, Lookup, Places
from gmt_tune.masking.scores import entries_to_keep
from gmt_tune.masking.search.devices import kernels_for, try_triton
from gmt_tune.masking.search.entries import Product
from gmt_tune.masking.selection import PlacedSelection, Selection, ThresholdSelection, pack

_DIGIT = 1 << 16  # an index is looked for in steps of so many


@torch.no_grad()
def place_exactly(
    parts: Sequence[Part], selections: Sequence[Selection], thresholds: Sequence[Tensor | None], density: float
) -> tuple[list[PlacedSelection], list[Tensor]]:
    """Selections without the ties that are too many, kept by the places of their entries. Waits for the device.

    On a GPU in a few launches and one wait for all tensors together, but for what is sharded: of that, only the places
    are found so, and ties are dropped tensor by tensor.

    Args:
        parts: of gradients; all ranks give the same ones.
        selections: of each, as scores make them. Those that rank nothing are kept as they are.
        thresholds: that each will show.
        density: of which k follows; fewer than k are selected where fewer entries are not zero.

    Returns:
        The selections, and how many entries of each whole gradient they have, 0-d int64.
    """
    ks = [entries_to_keep(part.numel, density) for part in parts]
    placed = _place_by_kernels(parts, selections, ks)
    for i in range(len(parts)):
        if i not in placed and (places := _place_natively(parts[i], selections[i], ks[i])) is not None:
            placed[i] = places
    others = [i for i in range(len(parts)) if i not in placed]
    bits = pack([selections[i] for i in others], [thresholds[i] for i in others])
    placed |= {i: Places(packed.bits, parts[i].local.numel()) for i, packed in zip(others, bits, strict=True)}
    counts = _sums([placed[i].count for i in range(len(parts))], parts)
    surplus = [count - k for count, k in zip(counts, ks, strict=True)]
    # Of whole tensors kernels and C++ have seen to them
    tied = [
        i
        for i, n in enumerate(surplus)
        if n > 0 and isinstance(selections[i], ThresholdSelection) and (i in others or parts[i].groups)
    ]
    ties = [_ties(selections[i], placed[i]) for i in tied]
    dropped = _drop_highest([parts[i] for i in tied], ties, [surplus[i] for i in tied])
    for i, (at, index) in zip(tied, dropped, strict=True):
        placed[i].drop_(at, index)
        counts[i] -= surplus[i]
    chosen = [
        PlacedSelection(placed[i], part.local.shape, threshold)
        for i, (part, threshold) in enumerate(zip(parts, thresholds, strict=True))
    ]
    return chosen, _numbers(counts, parts)


def _place_by_kernels(parts: Sequence[Part], selections: Sequence[Selection], ks: Sequence[int]) -> dict[int, Places]:
    """Where the selected entries of this process are, by position, as far as kernels serve; of whole tensors k."""
    ranked = {i: s for i, s in enumerate(selections) if type(s) is ThresholdSelection and s.score.numel()}
    kernels = kernels_for([s.score for s in ranked.values()])
    able = {i: s for i, s in ranked.items() if kernels is not None and kernels.can_pack(s.score)}
    if not able:
        return {}
    given = zip(*((s.score, s.threshold, s.search) for s in able.values()), strict=True)
    rooms = [parts[i].local.numel() if parts[i].groups else ks[i] for i in able]
    found = try_triton(kernels.place_thresholds, *given, rooms, SEGMENT, RUN)  # type: ignore[union-attr]
    return {
        i: Places.of_lookup(Lookup(*lookup), count, parts[i].local.numel())
        for i, (count, lookup) in zip(able, found or (), strict=found is not None)
    }


def _place_natively(part: Part, selection: Selection, k: int) -> Places | None:
    """Exactly k entries, where C++ serves and this process has the whole score."""
    if part.groups or type(selection) is not ThresholdSelection or not isinstance(selection.score, Tensor):
        return None
    return Places.of_largest(selection.score, int(selection.smallest()), k)


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
    totals = _sums([index.numel() for index in whole], parts)
    left = [total - n for total, n in zip(totals, surplus, strict=True)]
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


def _sums(values: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Counts of the whole gradients from those of their parts; waits for the device only where these are sharded."""
    if not any(part.groups for part in parts):
        return list(values)
    return [int(total) for total in sum_counts(_numbers(values, parts), parts)]


def _numbers(values: Sequence[int], parts: Sequence[Part]) -> list[Tensor]:
    """0-d int64, each on the device of its part; does not wait for it."""
    numbers = torch.tensor(
        values, dtype=torch.int64, device="cpu", pin_memory=any(part.local.is_cuda for part in parts)
    )
    rows = {device: numbers.to(device, non_blocking=True).unbind() for device in {part.local.device for part in parts}}
    return [rows[part.local.device][i] for i, part in enumerate(parts)]
