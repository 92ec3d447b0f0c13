"""Where selected entries are, found from their numbers: no index of them is ever in memory.

    segment = last s with starts[s] <= number
    index   = segment * SEGMENT + stored[number]                                if 16 bits are kept for each entry
            = place of the (number - starts[segment])-th set bit of the segment    if 1 bit is kept of each entry

A tile of numbers spans few segments, so that the first and the last are searched for once, and the rest between them.
Of bits, the runs of 256 entries whose ranks are kept are searched next, and then counted word by word.
"""

import triton
import triton.language as tl

from gmt_tune.optim.kernels.tiles import load


@triton.jit
def last_at_most(starts, low, high, numbers):
    """For each number the last i of low..high with starts[i] <= number; that of ``low`` is, and all ascend."""
    step = tl.full([], 1, tl.int64)
    while step * 2 <= high - low:
        step *= 2
    at = numbers * 0 + low
    while step > 0:
        later = at + step
        inside = later <= high
        at = tl.where(inside & (tl.load(starts + later, mask=inside, other=0) <= numbers), later, at)
        step = step >> 1
    return at


@triton.jit
def locate(
    first, count, stored, starts, ranks, segments,
    IS_SPARSE: tl.constexpr, SEGMENT: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """int64 flat indices of the selected entries from number ``first`` on, and which of these there are.

    All numbers are int64. What is not there has the index of another entry of the tensor.

    Args:
        first: a multiple of 16, below ``count``.
        count: how many entries are selected.
        stored, starts, ranks: pointers to what :class:`gmt_tune.masking.places.Lookup` holds, ``stored`` to
            int16 if sparse.
        segments: how many there are.
    """
    numbers = first + tl.arange(0, TILE)
    there = numbers < count
    numbers = tl.minimum(numbers, count - 1)
    low = last_at_most(starts, first * 0, segments - 1, first)
    high = last_at_most(starts, low, segments - 1, tl.minimum(first + TILE, count) - 1)
    segment = last_at_most(starts, low, high, numbers)
    if IS_SPARSE:
        room = tl.minimum(count - first, TILE).to(tl.int32)
        within = load(stored + first, room, 0, TILE).to(tl.int32) & (SEGMENT - 1)
    else:
        left = (numbers - tl.load(starts + segment)).to(tl.int32)
        RUNS: tl.constexpr = SEGMENT // RUN
        run_ranks = ranks + segment * RUNS
        run = left * 0
        rank = left * 0
        for i in tl.static_range(1, 17):
            if RUNS >> i > 0:
                later = run + (RUNS >> i)
                later_rank = tl.load(run_ranks + later).to(tl.int32) & (SEGMENT - 1)
                run = tl.where(later_rank <= left, later, run)
                rank = tl.where(later_rank <= left, later_rank, rank)
        left -= rank
        # The word in which the entry is: all before it have fewer set bits than are left
        words = stored.to(tl.pointer_type(tl.int32)) + (segment * (SEGMENT // 32) + run * (RUN // 32))
        word = tl.load(words).to(tl.uint32, bitcast=True)
        within = run * RUN
        for i in tl.static_range(1, RUN // 32):
            bits = _set_bits(word)
            passed = (left >= bits) & (within == run * RUN + (i - 1) * 32)
            left = tl.where(passed, left - bits, left)
            within = tl.where(passed, within + 32, within)
            word = tl.where(passed, tl.load(words + i).to(tl.uint32, bitcast=True), word)
        within += _set_bit(word, left)
    return segment * SEGMENT + within, there


@triton.jit
def find(index, stored, starts, ranks, IS_SPARSE: tl.constexpr, SEGMENT: tl.constexpr, RUN: tl.constexpr):
    """The number of each flat index among the selected entries, int64, and whether it is selected at all.

    The other way round from :func:`locate`, whose arguments these are: 16 bits are searched, bits are counted.
    """
    segment = index // SEGMENT
    within = (index % SEGMENT).to(tl.int32)
    first = tl.load(starts + segment)
    if IS_SPARSE:
        stored = stored.to(tl.pointer_type(tl.int16))
        length = (tl.load(starts + segment + 1) - first).to(tl.int32)
        longest = tl.max(length, 0)
        step = tl.full([], 1, tl.int32)
        while step * 2 <= longest:
            step *= 2
        rank = within * 0  # how many are before
        while step > 0:
            later = rank + step
            inside = later <= length
            value = tl.load(stored + first + later - 1, mask=inside, other=0).to(tl.int32) & (SEGMENT - 1)
            rank = tl.where(inside & (value < within), later, rank)
            step = step >> 1
        inside = rank < length
        value = tl.load(stored + first + rank, mask=inside, other=0).to(tl.int32) & (SEGMENT - 1)
        there = inside & (value == within)
    else:
        words = stored.to(tl.pointer_type(tl.int32)) + index // RUN * (RUN // 32)
        rank = tl.load(ranks + index // RUN).to(tl.int32) & (SEGMENT - 1)
        last = (within % RUN) // 32
        for i in tl.static_range(RUN // 32):
            word = tl.load(words + i).to(tl.uint32, bitcast=True)
            bit = (within % 32).to(tl.uint32)
            word = tl.where(i == last, word & ((1 << bit) - 1), word)
            rank += tl.where(i <= last, _set_bits(word), 0)
        there = (tl.load(words + last) >> (within % 32)) & 1 != 0
    return first + rank, there


@triton.jit
def _sums(word):
    """Numbers of set bits: in each 2, 4 and 8 bits of 32-bit words, and in all."""
    twos = word - ((word >> 1) & 0x55555555)
    fours = (twos & 0x33333333) + ((twos >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return twos, fours, eights, ((eights * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _set_bits(word):
    twos, fours, eights, bits = _sums(word)
    return bits


@triton.jit
def _set_bit(word, rank):
    """Where the set bit of this rank is, counted from 0, in a word that has it."""
    twos, fours, eights, bits = _sums(word)
    sixteens = eights + (eights >> 8)
    at = rank * 0
    at, rank = _halve(at, rank, sixteens & 31, 16)
    at, rank = _halve(at, rank, (eights >> at.to(tl.uint32)) & 15, 8)
    at, rank = _halve(at, rank, (fours >> at.to(tl.uint32)) & 15, 4)
    at, rank = _halve(at, rank, (twos >> at.to(tl.uint32)) & 3, 2)
    at, rank = _halve(at, rank, (word >> at.to(tl.uint32)) & 1, 1)
    return at


@triton.jit
def _halve(at, rank, lower, WIDTH: tl.constexpr):
    """Go on to the upper half where the lower one has too few set bits."""
    lower = lower.to(tl.int32)
    passed = rank >= lower
    return tl.where(passed, at + WIDTH, at), tl.where(passed, rank - lower, rank)
