"""Zero, in place, what a random draw leaves out, and count what it draws.

    x_i <- x_i if hash(key, place_i) <= last else 0

The hash is that of ``gmt_tune.masking.draws``, on the 64-bit place of an entry in the whole parameter. One read and
one write of the entries.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import load_tile
from gmt_tune.masking.search.kernels.tables import CHUNK, Table, to_device

TILE = 1 << 12  # entries that a program holds at a time: 16 a thread


@triton.jit
def _round(h, word, SHIFT: tl.constexpr, FACTOR: tl.constexpr):
    h = h ^ word
    return (h ^ (h >> SHIFT)) * FACTOR


@triton.jit
def _draw_kernel(
    pointers, leads, ends, first_chunks, chunk_tensors, draws, selected,
    FIRST_INT: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    lead = tl.load(leads + tensor)
    end = tl.load(ends + tensor)
    key = tl.load(draws + 3 * tensor)
    place = tl.load(draws + 3 * tensor + 1) - lead
    last = tl.load(draws + 3 * tensor + 2).to(tl.int32)
    pointer = tl.multiple_of(tl.load(pointers + tensor).to(tl.pointer_type(FIRST_INT)), 16)
    begin = (chunk - tl.load(first_chunks + tensor)) * (TILE * TILES)
    offsets = tl.arange(0, TILE)
    stayed = tl.zeros([TILE], tl.int32)
    for i in range(TILES):
        start = begin + i * TILE
        if start < end:
            low = tl.maximum(lead - start, 0).to(tl.int32)
            high = tl.minimum(end - start, TILE).to(tl.int32)
            entries, _ = load_tile(pointer + start, pointer + start, low, high, TILE, False)
            # 64-bit places in two words of 32 bits: the upper one is the next where the lower one has wrapped
            base = place + start
            lowest, upper = base.to(tl.uint32), (base >> 32).to(tl.uint32)
            lower = lowest + offsets.to(tl.uint32)
            h = _round(lower, key.to(tl.uint32), ROUNDS[0][0], ROUNDS[0][1])
            h = _round(h, (key >> 32).to(tl.uint32), ROUNDS[1][0], ROUNDS[1][1])
            word = tl.where(lower < lowest, (upper + 1) * 0x9E3779B9, upper * 0x9E3779B9)
            h = _round(h, word, ROUNDS[2][0], ROUNDS[2][1])
            kept = h.to(tl.int32, bitcast=True) <= last
            result = tl.where(kept, entries, tl.zeros_like(entries))
            if (low <= 0) & (high >= TILE):
                stayed += kept.to(tl.int32)
                tl.store(pointer + start + offsets, result)
            else:
                inside = (offsets >= low) & (offsets < high)
                stayed += (kept & inside).to(tl.int32)
                tl.store(pointer + start + offsets, result, mask=inside)
    tl.atomic_add(selected + tensor, tl.sum(stayed).to(tl.int64), sem="relaxed")


def apply_draws_(table: Table, draws: Sequence[tuple[int, int, int]], rounds: tuple[tuple[int, int], ...]) -> Tensor:
    """Apply a draw to each tensor of a table.

    Args:
        table: the tensors; their sets do not matter.
        draws: for each its 64-bit key (signed), the place of its first entry, and the last hash that is drawn.
        rounds: shifts and factors of the hash.

    Returns:
        int64 [tensors]: how many entries of each stayed.
    """
    selected = torch.zeros(table.num_tensors, dtype=torch.int64, device=table.pointers.device)
    on_device = to_device([number for draw in draws for number in draw], selected.device)
    _draw_kernel[(table.chunk_tensors.numel(),)](
        table.pointers, table.leads, table.ends, table.first_chunks, table.chunk_tensors, on_device, selected,
        FIRST_INT=table.constants["FIRST_INT"], ROUNDS=rounds, TILE=TILE, TILES=CHUNK // TILE, num_warps=8,
    )  # fmt: skip
    return selected
