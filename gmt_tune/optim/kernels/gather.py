"""The selected entries of many gradients, written or added up, and whether the whole gradients are finite.

    out_n <- grad[index_n]   or   out_n + grad[index_n],   n < count;      out_n <- 0,   count <= n < size
    flag  <- flag | any(grad is NaN or infinite)

Added in float32 and rounded once, as PyTorch does. A program reads its share of a gradient, and gathers its share of
the selected entries.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.places import RUN, SEGMENT, Lookup
from gmt_tune.masking.search.kernels.tables import ALIGNMENT, to_device
from gmt_tune.optim.by_kernels import Gather
from gmt_tune.optim.kernels.locate import last_at_most, locate
from gmt_tune.optim.kernels.tiles import load, rounded, store

TILE = 1 << 10  # entries that a program holds at a time: 8 a thread of 4 warps
TILES = 16  # of a program, of a gradient that is read as a whole

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["tensors"])
def _gather_kernel(
    table, tensors,
    GRAD: tl.constexpr, IS_ALIGNED: tl.constexpr, ADDS: tl.constexpr, CHECKS: tl.constexpr, IS_SPARSE: tl.constexpr,
    SEGMENT: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = table + last_at_most(table, program * 0, tensors.to(tl.int64) - 1, program)
    program -= tl.load(tensor)
    programs = tl.load(tensor + tensors)
    numel = tl.load(tensor + 2 * tensors)
    count = tl.load(tensor + 3 * tensors)
    size = tl.load(tensor + 4 * tensors)
    segments = tl.load(tensor + 5 * tensors)
    grad = tl.load(tensor + 6 * tensors).to(tl.pointer_type(GRAD))
    if IS_ALIGNED:
        grad = tl.multiple_of(grad, 16)
    out = tl.multiple_of(tl.load(tensor + 7 * tensors).to(tl.pointer_type(GRAD)), 16)
    stored = tl.multiple_of(tl.load(tensor + 8 * tensors).to(tl.pointer_type(tl.int16)), 16)
    starts = tl.load(tensor + 9 * tensors).to(tl.pointer_type(tl.int64))
    ranks = tl.load(tensor + 10 * tensors).to(tl.pointer_type(tl.int16))
    if CHECKS:
        largest = tl.zeros([TILE], tl.int32)
        for i in range(TILES):
            start = (program * TILES + i) * TILE
            if start < numel:
                room = tl.minimum(numel - start, TILE).to(tl.int32)
                values = load(grad + start, room, 0.0, TILE).to(tl.float32)
                largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if tl.max(largest, 0) >= 0x7F800000:
            tl.store(tl.load(tensor + 11 * tensors).to(tl.pointer_type(tl.uint8)), 1)
    first = program * TILE
    while first < size:
        room = tl.minimum(size - first, TILE).to(tl.int32)
        if first < count:
            index, there = locate(first, count, stored, starts, ranks, segments, IS_SPARSE, SEGMENT, RUN, TILE)
            values = tl.load(grad + index, mask=there, other=0.0)
            if ADDS:
                held = load(out + first, room, 0.0, TILE)
                values = rounded(held.to(tl.float32) + values.to(tl.float32), held.dtype)
            store(out + first, values, room, TILE)
        elif not ADDS:
            store(out + first, tl.zeros([TILE], GRAD), room, TILE)
        first += programs * TILE


def can_gather(grad: Tensor, lookup: Lookup) -> bool:
    """Whether the kernel knows a gradient's dtype and strides, and can read where entries are."""
    return grad.is_contiguous() and grad.dtype in _DTYPES and lookup.stored.data_ptr() % ALIGNMENT == 0


def kind_of(member: Gather) -> tuple:
    """Those of the same one are gathered together."""
    places, grad, _, flag, adds = member
    return grad.device, grad.dtype, grad.data_ptr() % ALIGNMENT == 0, places.lookup.ranks is None, flag is None, adds


def gather_(members: Sequence[Gather]) -> None:
    """Gather from gradients of one kind in one launch. Does not wait for the device."""
    device, dtype, is_aligned, is_sparse, is_trusted, adds = kind_of(members[0])
    # As many programs of each tensor as what is read of it takes
    share = TILE if is_trusted else TILE * TILES
    programs = [-(-(m.out.numel() if is_trusted else m.grad.numel()) // share) for m in members]
    firsts = itertools.accumulate(programs, initial=0)
    rows = [[first, n, *_row(member)] for first, n, member in zip(firsts, programs, members, strict=False)]
    table = to_device([value for column in zip(*rows, strict=True) for value in column], device)
    _gather_kernel[(sum(programs),)](
        table, len(members), GRAD=_DTYPES[dtype], IS_ALIGNED=is_aligned, ADDS=adds, CHECKS=not is_trusted,
        IS_SPARSE=is_sparse, SEGMENT=SEGMENT, RUN=RUN, TILE=TILE, TILES=TILES, num_warps=4,
    )  # fmt: skip


def _row(member: Gather) -> list[int]:
    """A row of the table, behind the numbers of programs."""
    places, grad, out, flag, _ = member
    stored, starts, ranks = places.lookup
    tensors = [grad, out, stored, starts, starts if ranks is None else ranks, out if flag is None else flag]
    numbers = [grad.numel(), places.count, out.numel(), starts.numel() - 1]
    return [*numbers, *(tensor.data_ptr() for tensor in tensors)]
