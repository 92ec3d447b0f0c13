"""States of selected entries, carried over to a new selection of many tensors: those of entries that stay.

    new_n <- old_m  where the entry with number n among the new ones has number m among the old ones,  else 0

for both moments and the age. Moments in 8 bits are read, and written block by block, as torchao does it, scale and code
the same bit for bit. Padding behind the entries becomes 0.

What a launch covers is a table, int64 [columns, tensors], of sizes and addresses: ``_row`` makes that of a tensor.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.places import RUN, SEGMENT, Lookup
from gmt_tune.masking.search.kernels.tables import to_device
from gmt_tune.optim.kernels.locate import find, last_at_most, locate
from gmt_tune.optim.kernels.moments import AGES, are_known, block_of, tensors_of, write
from gmt_tune.optim.kernels.tiles import store

TILE = 1 << 10  # entries that a program holds at a time, whole blocks of states: 4 a thread of 8 warps
TILES = 4


@dataclass
class States:
    """What is known of one tensor's selected entries, before or behind a new selection.

    Attributes:
        exp_avg, exp_avg_sq: moments, 1-d float32 tensors or both ``OptimState8bit``.
        age: int16 or int32, 1-d, as large as they are.
        lookup: where the entries are.
        count: how many they are, above 0.
    """

    exp_avg: Any
    exp_avg_sq: Any
    age: Tensor
    lookup: Lookup
    count: int

    def kind(self) -> tuple:
        """Those of the same one are carried over together."""
        return self.age.device, self.age.dtype, block_of(self.exp_avg), self.lookup.ranks is None

    def is_known(self) -> bool:
        """Whether the dtypes, states and memory are those that the kernel knows."""
        moments = self.exp_avg, self.exp_avg_sq
        return (
            self.age.dtype in AGES
            and are_known(moments, [self.age, self.lookup.stored], TILE)
            and {moment.numel() for moment in moments} == {self.age.numel()}
        )


@triton.jit
def _read_at(pointer, scale, qmap, numbers, there, BLOCK: tl.constexpr):
    """Entries of a moment by their numbers, in float32."""
    if BLOCK == 0:
        values = tl.load(pointer + numbers, mask=there, other=0.0)
    else:
        codes = tl.load(pointer + numbers, mask=there, other=0).to(tl.int32)
        scales = tl.load(scale + numbers // BLOCK, mask=there, other=0.0)
        values = tl.where(there, tl.load(qmap + codes) * scales, 0.0)
    return values


@triton.jit(do_not_specialize=["tensors"])
def _carry_kernel(
    table, tensors, first_qmap, second_qmap,
    STATE: tl.constexpr, AGE: tl.constexpr, BLOCK: tl.constexpr, IS_SPARSE: tl.constexpr, WAS_SPARSE: tl.constexpr,
    SEGMENT: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor = table + last_at_most(table, chunk * 0, tensors.to(tl.int64) - 1, chunk)
    first_chunk = tl.load(tensor)
    count = tl.load(tensor + tensors)
    size = tl.load(tensor + 2 * tensors)
    segments = tl.load(tensor + 3 * tensors)
    stored = tl.multiple_of(tl.load(tensor + 4 * tensors).to(tl.pointer_type(tl.int16)), 16)
    starts = tl.load(tensor + 5 * tensors).to(tl.pointer_type(tl.int64))
    ranks = tl.load(tensor + 6 * tensors).to(tl.pointer_type(tl.int16))
    age = tl.multiple_of(tl.load(tensor + 7 * tensors).to(tl.pointer_type(AGE)), 16)
    first = tl.multiple_of(tl.load(tensor + 8 * tensors).to(tl.pointer_type(STATE)), 16)
    second = tl.multiple_of(tl.load(tensor + 9 * tensors).to(tl.pointer_type(STATE)), 16)
    first_scale = tl.load(tensor + 10 * tensors).to(tl.pointer_type(tl.float32))
    second_scale = tl.load(tensor + 11 * tensors).to(tl.pointer_type(tl.float32))
    had_any = tl.load(tensor + 12 * tensors) > 0
    old_stored = tl.multiple_of(tl.load(tensor + 13 * tensors).to(tl.pointer_type(tl.int16)), 16)
    old_starts = tl.load(tensor + 14 * tensors).to(tl.pointer_type(tl.int64))
    old_ranks = tl.load(tensor + 15 * tensors).to(tl.pointer_type(tl.int16))
    old_age = tl.load(tensor + 16 * tensors).to(tl.pointer_type(AGE))
    old_first = tl.load(tensor + 17 * tensors).to(tl.pointer_type(STATE))
    old_second = tl.load(tensor + 18 * tensors).to(tl.pointer_type(STATE))
    old_first_scale = tl.load(tensor + 19 * tensors).to(tl.pointer_type(tl.float32))
    old_second_scale = tl.load(tensor + 20 * tensors).to(tl.pointer_type(tl.float32))
    for i in range(TILES):
        start = (chunk - first_chunk) * (TILE * TILES) + i * TILE
        if start < size:
            room = tl.minimum(size - start, TILE).to(tl.int32)
            numbers = tl.zeros([TILE], tl.int64)
            there = numbers > 0
            if had_any & (start < count):
                index, there = locate(start, count, stored, starts, ranks, segments, IS_SPARSE, SEGMENT, RUN, TILE)
                numbers, stays = find(index, old_stored, old_starts, old_ranks, WAS_SPARSE, SEGMENT, RUN)
                there = there & stays
            store(age + start, tl.load(old_age + numbers, mask=there, other=0), room, TILE)
            m = _read_at(old_first, old_first_scale, first_qmap, numbers, there, BLOCK)
            v = _read_at(old_second, old_second_scale, second_qmap, numbers, there, BLOCK)
            write(first, first_scale, first_qmap, m, start, room, BLOCK, TILE)
            write(second, second_scale, second_qmap, v, start, room, BLOCK, TILE)


def carry(pairs: Sequence[tuple[States | None, States]]) -> None:
    """Write new states, in one launch. Does not wait for the device.

    Args:
        pairs: for each tensor, what is known of it before and behind its new selection, in other memory: all
            ``is_known``, and of the same ``kind`` on either side. Nothing was selected before where it is None.
    """
    device, age_dtype, block, is_sparse = pairs[0][1].kind()
    was_sparse = next((before.kind()[-1] for before, _ in pairs if before is not None), is_sparse)
    chunks = [0, *itertools.accumulate(-(-new.age.numel() // (TILE * TILES)) for _, new in pairs)]
    rows = []
    for first_chunk, (before, new) in zip(chunks, pairs, strict=False):
        old = _row(new if before is None else before)
        size, segments = new.age.numel(), new.lookup.starts.numel() - 1
        rows.append([first_chunk, new.count, size, segments, *_row(new), 0 if before is None else before.count, *old])
    table = to_device([value for column in zip(*rows, strict=True) for value in column], device)
    example = pairs[0][1]
    qmaps = (example.exp_avg.qmap, example.exp_avg_sq.qmap) if block else (table, table)
    _carry_kernel[(chunks[-1],)](
        table, len(pairs), *qmaps, STATE=tl.uint8 if block else tl.float32, AGE=AGES[age_dtype], BLOCK=block,
        IS_SPARSE=is_sparse, WAS_SPARSE=was_sparse, SEGMENT=SEGMENT, RUN=RUN, TILE=TILE, TILES=TILES, num_warps=8,
    )  # fmt: skip


def _row(states: States) -> list[int]:
    """Addresses of one side."""
    stored, starts, ranks = states.lookup
    tensors = [stored, starts, starts if ranks is None else ranks, states.age]
    return [tensor.data_ptr() for tensor in (*tensors, *tensors_of([states.exp_avg, states.exp_avg_sq]))]
