"""How many entries of each set fall into each bin of its window.

    counts[s, b] = #{x in s : clamp((bits(x) - window_s) >> shift_s, 0, BINS - 1) = b}

The first bin takes what lies below the window too, and the last what lies above, so the sum of the counts from
bin b on, b > 0, is how many entries have at least ``window + (b << shift)``. The histogram is Triton's: votes
within each warp. Padding counts as zero; it falls into the first bin, whose count nobody needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import as_pointers, load_tile, magnitude_bits
from gmt_tune.masking.search.kernels.tables import CHUNK, Table

TILE = 1 << 13  # entries that a program holds at a time: 32 a thread


@triton.jit
def _count_kernel(
    pointers, seconds, leads, ends, first_chunks, sets, chunk_tensors, lows, highs, windows, shifts, counts, largest,
    RANKED_BY: tl.constexpr, FIRST: tl.constexpr, FIRST_INT: tl.constexpr, SECOND: tl.constexpr,
    SECOND_INT: tl.constexpr, SCORE: tl.constexpr, SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
    SECOND_ALIGNED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    one = tl.load(sets + tensor)
    is_open = tl.load(highs + one) - tl.load(lows + one) > 1
    if IS_FIRST or is_open:
        window = tl.load(windows + one).to(tl.int32)
        shift = tl.load(shifts + one).to(tl.int32)
        lead = tl.load(leads + tensor)
        end = tl.load(ends + tensor)
        first_pointer, second_pointer = as_pointers(
            tl.load(pointers + tensor), tl.load(seconds + tensor), FIRST_INT, SECOND_INT, SECOND_ALIGNED
        )
        begin = (chunk - tl.load(first_chunks + tensor)) * (TILE * TILES)
        histogram = tl.zeros([BINS], tl.int32)
        peaks = tl.zeros([TILE], tl.int32)
        for i in range(TILES):
            start = begin + i * TILE
            if start < end:
                # Positions from here on fit 32 bits
                low = tl.maximum(lead - start, 0).to(tl.int32)
                high = tl.minimum(end - start, TILE).to(tl.int32)
                first, second = load_tile(
                    first_pointer + start, second_pointer + start, low, high, TILE, RANKED_BY != "first"
                )
                bits = magnitude_bits(first, second, RANKED_BY, FIRST, SECOND, SCORE, SCORE_INT, MASK, NAN)
                digits = tl.minimum(tl.maximum((bits - window) >> shift, 0), BINS - 1)
                histogram += tl.histogram(digits, BINS)
                if IS_FIRST:
                    peaks = tl.maximum(peaks, bits)
        tl.atomic_add(counts + one * BINS + tl.arange(0, BINS), histogram.to(tl.int64), sem="relaxed")
        if IS_FIRST:
            tl.atomic_max(largest + tensor, tl.max(peaks), sem="relaxed")


def count_in_windows(table: Table, state: tuple[Tensor, ...], counts: Tensor, largest: Tensor | None) -> None:
    """Add to the counts of all sets whose threshold is not yet known.

    Args:
        table: the sets.
        state: as ``sample_windows`` gives it.
        counts: int64 [sets, bins], zero.
        largest: int32 [tensors], zero; gets each tensor's largest magnitude, and has all sets counted.
    """
    _count_kernel[(table.chunk_tensors.numel(),)](
        table.pointers, table.seconds, table.leads, table.ends, table.first_chunks, table.sets, table.chunk_tensors,
        *state, counts, counts if largest is None else largest, **table.constants, TILE=TILE,
        TILES=CHUNK // TILE, BINS=counts.shape[1], IS_FIRST=largest is not None, num_warps=8,
    )  # fmt: skip


def zero_counts(num_sets: int, bins: int, device: torch.device) -> Tensor:
    return torch.zeros(num_sets, bins, dtype=torch.int64, device=device)
