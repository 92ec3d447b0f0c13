"""From the counts of a window to the next, narrower one.

    b    = the last bin from which on at least k entries are counted
    low  = min(max(low, window + (b << shift)), NAN)    if b > 0
    high = min(high, window + ((b + 1) << shift))       if b < BINS - 1

The k-th largest magnitude T keeps low <= T < high: at least k entries reach the one edge, fewer the other. NAN,
the smallest one, stands for all. The next window is [low, high) with bins as narrow as can be. When
high = low + 1, T = low.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _narrow_kernel(counts, ks, lows, highs, windows, shifts, NAN: tl.constexpr, BINS: tl.constexpr):
    one = tl.program_id(0)
    low = tl.load(lows + one)
    high = tl.load(highs + one)
    if high - low > 1:
        k = tl.load(ks + one)
        window = tl.load(windows + one)
        shift = tl.load(shifts + one)
        at = counts + one * BINS + tl.arange(0, BINS)
        at_least = tl.cumsum(tl.load(at), 0, reverse=True)
        digit = tl.sum((at_least >= k).to(tl.int64)) - 1
        edge = window + (digit << shift)
        if digit > 0:
            low = tl.minimum(tl.maximum(low, edge), NAN)
        if digit < BINS - 1:
            high = tl.minimum(high, edge + (1 << shift))
        powers = tl.arange(0, 32).to(tl.int64)
        tl.store(lows + one, low)
        tl.store(highs + one, high)
        tl.store(windows + one, low)
        tl.store(shifts + one, tl.sum(((BINS << powers) < high - low).to(tl.int64)))
        tl.store(at, tl.zeros([BINS], tl.int64))


def narrow_windows(counts: Tensor, ks: Tensor, state: tuple[Tensor, ...], nan: int) -> None:
    """Change the state, as ``sample_windows`` gives it, and set the counts to zero for the next ones.

    Args:
        counts: int64 [sets, bins].
        ks: int64 [sets].
        state: int64 tensors [sets].
        nan: bits of the smallest NaN.
    """
    _narrow_kernel[(ks.numel(),)](counts, ks, *state, NAN=nan, BINS=counts.shape[1], num_warps=1)
