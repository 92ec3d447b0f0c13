"""Zero, in place, what a threshold does not select, and count what stays.

    x <- x if bits(score) >= smallest else 0,   selected = #{x : bits(score) >= smallest}

One read and one write of the entries; ``smallest`` is the threshold's bits, and at least 1 (zeros are never
selected). The sign and payload of what stays are not touched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import as_pointers, load_tile, magnitude_bits
from gmt_tune.masking.search.kernels.tables import CHUNK, Table

TILE = 1 << 12  # entries that a program holds at a time: 16 a thread


@triton.jit
def _apply_kernel(
    pointers, seconds, leads, ends, first_chunks, chunk_tensors, smallest, selected,
    RANKED_BY: tl.constexpr, FIRST: tl.constexpr, FIRST_INT: tl.constexpr, SECOND: tl.constexpr,
    SECOND_INT: tl.constexpr, SCORE: tl.constexpr, SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
    SECOND_ALIGNED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    lead = tl.load(leads + tensor)
    end = tl.load(ends + tensor)
    least = tl.load(smallest + tensor)
    first_pointer, second_pointer = as_pointers(
        tl.load(pointers + tensor), tl.load(seconds + tensor), FIRST_INT, SECOND_INT, SECOND_ALIGNED
    )
    begin = (chunk - tl.load(first_chunks + tensor)) * (TILE * TILES)
    offsets = tl.arange(0, TILE)
    stayed = tl.zeros([TILE], tl.int32)
    for i in range(TILES):
        start = begin + i * TILE
        if start < end:
            # Positions from here on fit 32 bits
            low = tl.maximum(lead - start, 0).to(tl.int32)
            high = tl.minimum(end - start, TILE).to(tl.int32)
            first, second = load_tile(
                first_pointer + start, second_pointer + start, low, high, TILE, RANKED_BY != "first"
            )
            kept = magnitude_bits(first, second, RANKED_BY, FIRST, SECOND, SCORE, SCORE_INT, MASK, NAN) >= least
            result = tl.where(kept, first, tl.zeros_like(first))
            stayed += kept.to(tl.int32)
            if (low <= 0) & (high >= TILE):
                tl.store(first_pointer + start + offsets, result)
            else:
                tl.store(first_pointer + start + offsets, result, mask=(offsets >= low) & (offsets < high))
    tl.atomic_add(selected + tensor, tl.sum(stayed).to(tl.int64), sem="relaxed")


def apply_smallest_(table: Table, smallest: Tensor) -> Tensor:
    """Apply a threshold to each tensor of a table.

    Args:
        table: the tensors; their sets do not matter.
        smallest: int32 [tensors], the smallest selected bits, at least 1.

    Returns:
        int64 [tensors]: how many entries of each stayed.
    """
    selected = torch.zeros(smallest.numel(), dtype=torch.int64, device=smallest.device)
    _apply_kernel[(table.chunk_tensors.numel(),)](
        table.pointers, table.seconds, table.leads, table.ends, table.first_chunks, table.chunk_tensors, smallest,
        selected, **table.constants, TILE=TILE, TILES=CHUNK // TILE, num_warps=8,
    )  # fmt: skip
    return selected
