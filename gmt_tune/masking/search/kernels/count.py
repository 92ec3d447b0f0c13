"""How many entries of each set fall into each bin of its window, at most 32.

    counts[s, b] = #{x in s : clamp((bits(x) - window_s) >> shift_s, 0, BINS - 1) = b}

The first bin takes what lies below the window too, and the last what lies above, so the sum of the counts from
bin b on, b > 0, is how many entries have at least ``window + (b << shift)``. Padding counts as zero; it falls into
the first bin, whose count nobody needs.

An entry is the word ``1 << b``, and a thread adds up words bit by bit, as 32 counters that lie across its words:
plane j holds bit j of each. Adding a word takes two or three logical operations, however many bins there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import as_pointers, load_tile, magnitude_bits
from gmt_tune.masking.search.kernels.tables import CHUNK, Table

TILE = 1 << 10  # entries that a program holds at a time: 8 a thread of 4 warps


@triton.jit
def _add(plane, a, b):
    """The bits of plane + a + b, and what they carry."""
    either = plane ^ a
    return either ^ b, (plane & a) | (either & b)


@triton.jit
def _add_halves(plane, words, ADJACENT: tl.constexpr):
    """Neighbours are added where a thread loads them together, else words half a tile apart: both are one thread's."""
    N: tl.constexpr = words.shape[0]
    if ADJACENT:
        a, b = tl.split(tl.reshape(words, (N // 2, 2)))
    else:
        a, b = tl.split(tl.trans(tl.reshape(words, (2, N // 2))))
    return _add(plane, a, b)


@triton.jit
def _counts(plane, J: tl.constexpr, BINS: tl.constexpr):
    """What plane J adds to the count of each bin."""
    return tl.sum((plane[:, None] >> tl.arange(0, BINS)[None, :]) & 1, 0) << J


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
        p0 = tl.zeros([TILE // 2], tl.int32)
        p1 = tl.zeros([TILE // 4], tl.int32)
        none = tl.zeros([TILE // 8], tl.int32)
        p2, p3, p4, p5, p6, p7, p8, p9, p10 = none, none, none, none, none, none, none, none, none  # 8 TILES < 2**11
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
                digits = tl.minimum(tl.maximum(bits - window, 0) >> shift, BINS - 1)
                p0, carry = _add_halves(p0, 1 << digits, True)
                p1, carry = _add_halves(p1, carry, True)
                p2, carry = _add_halves(p2, carry, FIRST_INT == tl.int16)
                p3, carry = _add(p3, carry, 0)
                p4, carry = _add(p4, carry, 0)
                p5, carry = _add(p5, carry, 0)
                p6, carry = _add(p6, carry, 0)
                p7, carry = _add(p7, carry, 0)
                p8, carry = _add(p8, carry, 0)
                p9, carry = _add(p9, carry, 0)
                p10 = p10 ^ carry
                if IS_FIRST:
                    peaks = tl.maximum(peaks, bits)
        histogram = _counts(p0, 0, BINS) + _counts(p1, 1, BINS) + _counts(p2, 2, BINS) + _counts(p3, 3, BINS)
        histogram += _counts(p4, 4, BINS) + _counts(p5, 5, BINS) + _counts(p6, 6, BINS) + _counts(p7, 7, BINS)
        histogram += _counts(p8, 8, BINS) + _counts(p9, 9, BINS) + _counts(p10, 10, BINS)
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
        TILES=CHUNK // TILE, BINS=counts.shape[1], IS_FIRST=largest is not None, num_warps=4,
    )  # fmt: skip


def zero_counts(num_sets: int, bins: int, device: torch.device) -> Tensor:
    return torch.zeros(num_sets, bins, dtype=torch.int64, device=device)
