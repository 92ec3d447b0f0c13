"""Which entries of a block changed, in bytes: the gaps between them, or a bit for each entry, whichever is shorter."""

from __future__ import annotations

import numpy as np

# Entries of a flat tensor that are coded together, the last block may have fewer: what is in memory at a time
BLOCK = 1 << 20

_BITS = 7  # of a gap in a byte, whose uppermost bit says that more bytes of this gap follow


def encode(indices: np.ndarray, numel: int) -> np.ndarray:
    """Code a block's changed entries.

    Args:
        indices: 1-d int64, rising, from 0 to ``numel`` - 1.
        numel: entries of the block.

    Returns:
        1-d uint8. Of ``ceil(numel / 8)`` bytes, entry ``i`` is bit ``i % 8`` of byte ``i // 8``. Fewer bytes are gaps,
        which count the entries skipped before each changed one, in LEB128: 7 bits a byte, the lowest first.
    """
    gaps = np.diff(indices, prepend=-1) - 1
    lengths = np.ones(len(gaps), dtype=np.int64)
    for bits in range(_BITS, numel.bit_length(), _BITS):
        lengths += gaps >= 1 << bits
    if lengths.sum() >= (numel + 7) // 8:
        flags = np.zeros(numel, dtype=bool)
        flags[indices] = True
        return np.packbits(flags, bitorder="little")
    coded = np.empty(lengths.sum(), dtype=np.uint8)
    starts = np.cumsum(lengths) - lengths
    for i in range(lengths.max(initial=0)):
        is_longer = lengths > i
        more = (lengths[is_longer] > i + 1).astype(np.int64) << _BITS
        coded[starts[is_longer] + i] = gaps[is_longer] >> i * _BITS & (1 << _BITS) - 1 | more
    return coded


def decode(coded: np.ndarray, numel: int) -> np.ndarray:
    """The indices that :func:`encode` coded.

    Raises:
        ValueError: if it cannot have coded them.
    """
    if len(coded) == (numel + 7) // 8:
        flags = np.unpackbits(coded, bitorder="little")
        if flags[numel:].any():
            raise ValueError("bits behind the block's end")
        return np.flatnonzero(flags)
    is_last = coded < 1 << _BITS
    ends = np.flatnonzero(is_last) + 1
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
    gaps = np.zeros(len(ends), dtype=np.int64)
    longest = int((ends - starts).max(initial=0))
    if len(coded) and (not is_last[-1] or longest * _BITS >= numel.bit_length() + _BITS):
        raise ValueError("a gap without end")
    for i in range(longest):
        is_longer = ends - starts > i
        gaps[is_longer] |= (coded[starts[is_longer] + i].astype(np.int64) & (1 << _BITS) - 1) << i * _BITS
    indices = np.cumsum(gaps + 1) - 1
    if len(indices) and indices[-1] >= numel:
        raise ValueError("an index behind the block's end")
    return indices
