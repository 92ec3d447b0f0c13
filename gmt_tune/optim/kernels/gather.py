"""The selected entries of a gradient, written or added up, and whether the whole gradient is finite.

    out_n <- grad[index_n]   or   out_n + grad[index_n],   n < count;      out_n <- 0,   count <= n < size
    flag  <- flag | any(grad is NaN or infinite)

Added in float32 and rounded once, as PyTorch does. A program reads its share of the gradient, and gathers its share of
the selected entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.places import RUN, SEGMENT, Lookup
from gmt_tune.masking.search.kernels.tables import ALIGNMENT
from gmt_tune.optim.kernels.locate import locate
from gmt_tune.optim.kernels.tiles import load, rounded, store

TILE = 1 << 10  # entries that a program holds at a time: 8 a thread of 4 warps
TILES = 16  # of a program, of a gradient that is read as a whole


@triton.jit(do_not_specialize=["numel", "count", "size", "segments"])
def _gather_kernel(
    grad, out, flag, stored, starts, ranks, numel, count, size, segments,
    ADDS: tl.constexpr, CHECKS: tl.constexpr, IS_SPARSE: tl.constexpr, SEGMENT: tl.constexpr, RUN: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if CHECKS:
        largest = tl.zeros([TILE], tl.int32)
        for i in range(TILES):
            start = (program * TILES + i) * TILE
            if start < numel:
                room = tl.minimum(numel - start, TILE).to(tl.int32)
                values = load(grad + start, room, 0.0, TILE).to(tl.float32)
                largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if tl.max(largest, 0) >= 0x7F800000:
            tl.store(flag, 1)
    first = program * TILE
    while first < size:
        room = tl.minimum(size - first, TILE).to(tl.int32)
        if first < count:
            index, there = locate(
                first, count.to(tl.int64), stored, starts, ranks, segments.to(tl.int64), IS_SPARSE, SEGMENT, RUN, TILE
            )
            values = tl.load(grad + index, mask=there, other=0.0)
            if ADDS:
                held = load(out + first, room, 0.0, TILE)
                values = rounded(held.to(tl.float32) + values.to(tl.float32), held.dtype)
            store(out + first, values, room, TILE)
        elif not ADDS:
            store(out + first, tl.zeros([TILE], out.dtype.element_ty), room, TILE)
        first += tl.num_programs(0).to(tl.int64) * TILE


def can_gather(grad: Tensor, lookup: Lookup, held: Tensor | None) -> bool:
    """Whether the kernel knows a gradient's dtype and strides, can read where entries are, and add to what is held."""
    is_known = grad.is_contiguous() and grad.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return is_known and lookup.stored.data_ptr() % ALIGNMENT == 0 and (held is None or held.dtype == grad.dtype)


def gather_(grad: Tensor, lookup: Lookup, count: int, out: Tensor, flag: Tensor | None, *, adds: bool) -> None:
    """Overwrite, or add to, entries by the selected ones of a gradient.

    Args:
        grad: contiguous, with selected entries.
        lookup: where these are.
        count: how many they are.
        out: 1-d, of the gradient's dtype, at least so many; what is more becomes 0, or stays where it is added to.
        flag: 0-d bool, set if the gradient holds NaN or infinity; None does not look.
        adds: whether to add to what there is.
    """
    stored, starts, ranks = lookup
    flags = stored if flag is None else flag.view(torch.uint8)
    tiles = -(-out.numel() // TILE)
    programs = tiles if flag is None else -(-grad.numel() // (TILE * TILES))
    _gather_kernel[(programs,)](
        grad, out, flags, stored, starts, starts if ranks is None else ranks, grad.numel(), count, out.numel(),
        starts.numel() - 1, ADDS=adds, CHECKS=flag is not None, IS_SPARSE=ranks is None, SEGMENT=SEGMENT, RUN=RUN,
        TILE=TILE, TILES=TILES, num_warps=4,
    )  # fmt: skip
