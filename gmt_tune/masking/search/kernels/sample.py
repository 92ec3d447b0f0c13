"""Where the threshold of each set is likely to lie, from a few random entries.

    window = [q(r + d), q(r - d)],  r = k * m / n,  d = 4 * sqrt(r * (1 - r / m)) + 2

where q(i) is the i-th largest magnitude among m of the set's n entries, one drawn at random from each of m
equal parts: twice as many for float32, where a narrower window spares large models a count. The threshold lies
outside about once in ten thousand times, which costs time and nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import magnitude_bits
from gmt_tune.masking.search.kernels.tables import Table

SAMPLE = 1 << 14


@triton.jit
def _sample_kernel(
    pointers, seconds, leads, starts, set_bounds, ks, lows, highs, windows, shifts, search_steps,
    RANKED_BY: tl.constexpr, FIRST: tl.constexpr, FIRST_INT: tl.constexpr, SECOND: tl.constexpr,
    SECOND_INT: tl.constexpr, SCORE: tl.constexpr, SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
    KEY_BITS: tl.constexpr, BINS: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(0)
    first_tensor = tl.load(set_bounds + one)
    bound = tl.load(set_bounds + one + 1)
    before = tl.load(starts + first_tensor)
    n = tl.load(starts + bound) - before

    i = tl.arange(0, SAMPLE).to(tl.int64)
    part = i * n // SAMPLE
    width = (i + 1) * n // SAMPLE - part
    chance = (tl.randint(0, tl.arange(0, SAMPLE)) & 0x7FFFFFFF).to(tl.int64)
    position = before + part + ((chance * width) >> 31)
    # The tensor that holds each position, bit by bit
    tensor = tl.zeros([SAMPLE], tl.int64) + first_tensor
    for step in range(search_steps):
        later = tensor + (1 << (search_steps - 1 - step))
        holds = (later < bound) & (tl.load(starts + tl.minimum(later, bound)) <= position)
        tensor = tl.where(holds, later, tensor)
    offset = position - tl.load(starts + tensor) + tl.load(leads + tensor)
    first = tl.load(tl.load(pointers + tensor).to(tl.pointer_type(FIRST_INT)) + offset)
    second = first
    if RANKED_BY != "first":
        second = tl.load(tl.load(seconds + tensor).to(tl.pointer_type(SECOND_INT)) + offset)
    bits = magnitude_bits(first, second, RANKED_BY, FIRST, SECOND, SCORE, SCORE_INT, MASK, NAN)

    rank = tl.load(ks + one).to(tl.float32) * (SAMPLE / n.to(tl.float32))
    margin = 4.0 * tl.sqrt(tl.maximum(rank * (1.0 - rank / SAMPLE), 0.0)) + 2.0
    low_rank = tl.ceil(rank + margin).to(tl.int32)
    high_rank = tl.floor(rank - margin).to(tl.int32)
    low = tl.zeros([], tl.int32)
    high = tl.zeros([], tl.int32)
    for step in range(KEY_BITS):
        bit = 1 << (KEY_BITS - 1 - step)
        low = tl.where(tl.sum((bits >= (low | bit)).to(tl.int32)) >= low_rank, low | bit, low)
        high = tl.where(tl.sum((bits >= (high | bit)).to(tl.int32)) >= high_rank, high | bit, high)

    # A bin lies to either side, and the bins are as narrow as can be
    low = tl.minimum(low, NAN)
    span = tl.minimum(high, NAN).to(tl.int64) + 1 - low
    powers = tl.arange(0, 32).to(tl.int64)
    shift = tl.sum((((BINS - 2) << powers) < span).to(tl.int64))
    spare = ((BINS - 2) << shift) - span
    window = tl.maximum(low - (1 << shift) - spare // 2, 0)
    tl.store(lows + one, 0)
    tl.store(highs + one, NAN + 1)
    tl.store(windows + one, window)
    tl.store(shifts + one, shift)


def sample_windows(table: Table, ks: Tensor, bins: int, key_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State of a search, for each set of the table.

    Args:
        table: the sets.
        ks: int64 [sets], ranks from the top.
        bins: how many bins the next count has.
        key_bits: how many bits the magnitude has.

    Returns:
        int64 tensors [sets]: low and high, between which the threshold lies (low <= threshold < high, as bits),
        the window's first bits, and the binary logarithm of its bins' width.
    """
    lows, highs, windows, shifts = (torch.empty_like(ks) for _ in range(4))
    constants = {name: value for name, value in table.constants.items() if name != "SECOND_ALIGNED"}
    _sample_kernel[(ks.numel(),)](
        table.pointers, table.seconds, table.leads, table.starts, table.set_bounds, ks, lows, highs, windows, shifts,
        (table.largest_set - 1).bit_length(), **constants, KEY_BITS=key_bits, BINS=bins,
        SAMPLE=SAMPLE * 2 if key_bits == 31 else SAMPLE, num_warps=16,
    )  # fmt: skip
    return lows, highs, windows, shifts
