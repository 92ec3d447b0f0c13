"""Tiles of entries that lie side by side: read, rounded and written."""

import triton
import triton.language as tl


@triton.jit
def load(pointer, room, other, TILE: tl.constexpr):
    """The TILE entries from a pointer on; ``other`` from ``room`` on. Without a mask, loads are as wide as can be."""
    offsets = tl.arange(0, TILE)
    if room >= TILE:
        values = tl.load(pointer + offsets)
    else:
        values = tl.load(pointer + offsets, mask=offsets < room, other=other)
    return values


@triton.jit
def store(pointer, values, room, TILE: tl.constexpr):
    """Write the first ``room`` entries of a tile."""
    offsets = tl.arange(0, TILE)
    if room >= TILE:
        tl.store(pointer + offsets, values)
    else:
        tl.store(pointer + offsets, values, mask=offsets < room)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """float32 in another dtype: the nearest, and the even one of two. Triton's interpreter cuts bfloat16 off."""
    if DTYPE == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values != values, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        values = (bits & -65536).to(tl.float32, bitcast=True)
    return values.to(DTYPE)
