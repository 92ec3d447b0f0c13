"""Where the k entries with the largest scores are, by segments; of those that tie at the threshold, the first ones.

    above[s], tied[s] = #{i in segment s : bits(score_i) > least},  #{i in segment s : bits(score_i) = least}
    entry i is selected if bits(score_i) > least, or it is equal and one of the first ``kept`` ties of its tensor

The first kernel counts, the second one writes what :class:`gmt_tune.masking.places.Lookup` holds. Between them the host
reads the sums: sizes of memory follow from them. A program has one segment in both; a chunk of a table is several.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import as_pointers, load_tile, magnitude_bits
from gmt_tune.masking.search.kernels.tables import CHUNK, Table, to_device

TILE = 1 << 12  # entries that a program holds at a time: 16 a thread


@triton.jit
def _count_kernel(
    pointers, seconds, ends, first_chunks, chunk_tensors, smallest, counts,
    RANKED_BY: tl.constexpr, FIRST: tl.constexpr, FIRST_INT: tl.constexpr, SECOND: tl.constexpr,
    SECOND_INT: tl.constexpr, SCORE: tl.constexpr, SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
    SECOND_ALIGNED: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors + program // SEGMENTS)
    end = tl.load(ends + tensor)
    least = tl.load(smallest + tensor)
    first_pointer, second_pointer = as_pointers(
        tl.load(pointers + tensor), tl.load(seconds + tensor), FIRST_INT, SECOND_INT, SECOND_ALIGNED
    )
    begin = (program - tl.load(first_chunks + tensor) * SEGMENTS) * SEGMENT
    above = tl.zeros([TILE], tl.int32)
    tied = tl.zeros([TILE], tl.int32)
    for i in range(SEGMENT // TILE):
        start = begin + i * TILE
        if start < end:
            high = tl.minimum(end - start, TILE).to(tl.int32)
            first, second = load_tile(
                first_pointer + start, second_pointer + start, 0, high, TILE, RANKED_BY != "first"
            )
            # What lies behind the last entry was loaded as 0, and is never selected
            bits = magnitude_bits(first, second, RANKED_BY, FIRST, SECOND, SCORE, SCORE_INT, MASK, NAN)
            above += (bits > least).to(tl.int32)
            tied += (bits == least).to(tl.int32)
    tl.store(counts + program, tl.sum(above).to(tl.int64))
    tl.store(counts + tl.num_programs(0) + program, tl.sum(tied).to(tl.int64))


@triton.jit(do_not_specialize=["tensors"])
def _place_kernel(
    pointers, seconds, ends, first_chunks, chunk_tensors, smallest, sums, tensors, placing,
    RANKED_BY: tl.constexpr, FIRST: tl.constexpr, FIRST_INT: tl.constexpr, SECOND: tl.constexpr,
    SECOND_INT: tl.constexpr, SCORE: tl.constexpr, SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
    SECOND_ALIGNED: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors + program // SEGMENTS)
    end = tl.load(ends + tensor)
    first_program = tl.load(first_chunks + tensor) * SEGMENTS
    segment = program - first_program
    begin = segment * SEGMENT
    if begin < end:
        least = tl.load(smallest + tensor)
        stay = tl.load(placing + tensor)
        stored = tl.load(placing + tensors + tensor)
        starts = tl.load(placing + 2 * tensors + tensor).to(tl.pointer_type(tl.int64)) + segment
        ranks = tl.load(placing + 3 * tensors + tensor).to(tl.pointer_type(tl.int16))
        is_sparse = tl.load(placing + 4 * tensors + tensor) != 0
        first_pointer, second_pointer = as_pointers(
            tl.load(pointers + tensor), tl.load(seconds + tensor), FIRST_INT, SECOND_INT, SECOND_ALIGNED
        )
        above = sums + first_program
        tied = above + tl.num_programs(0) + 1
        ties_before = tl.load(tied + segment) - tl.load(tied)
        selected_before = tl.load(above + segment) - tl.load(above) + tl.minimum(ties_before, stay)
        tl.store(starts, selected_before)
        left = tl.minimum(tl.maximum(stay - ties_before, 0), SEGMENT).to(tl.int32)  # ties that stay from here on
        found = left * 0  # entries of the segment that are selected
        entries = tl.arange(0, TILE)
        for i in range(SEGMENT // TILE):
            high = tl.minimum(tl.maximum(end - begin - i * TILE, 0), TILE).to(tl.int32)
            first, second = load_tile(
                first_pointer + begin + i * TILE, second_pointer + begin + i * TILE, 0, high, TILE,
                RANKED_BY != "first",
            )  # fmt: skip
            bits = magnitude_bits(first, second, RANKED_BY, FIRST, SECOND, SCORE, SCORE_INT, MASK, NAN)
            ties = (bits == least).to(tl.int32)
            stays = ((bits > least) | ((ties != 0) & (tl.cumsum(ties, 0) <= left))).to(tl.int32)
            left = tl.maximum(left - tl.sum(ties), 0)
            if is_sparse:
                at = selected_before + found + tl.cumsum(stays, 0) - 1
                tl.store(stored.to(tl.pointer_type(tl.int16)) + at, (i * TILE + entries).to(tl.int16), mask=stays != 0)
            else:
                octets = tl.sum(tl.reshape(stays, (TILE // 8, 8)) << tl.arange(0, 8)[None, :], 1)
                to = stored.to(tl.pointer_type(tl.uint8)) + (begin + i * TILE) // 8
                in_runs = (high + RUN - 1) // RUN * RUN  # up to the end of the last run
                tl.store(to + tl.arange(0, TILE // 8), octets.to(tl.uint8), mask=tl.arange(0, TILE // 8) * 8 < in_runs)
                by_run = tl.sum(tl.reshape(stays, (TILE // RUN, RUN)), 1)
                before = found + tl.cumsum(by_run, 0) - by_run
                runs = (begin + i * TILE) // RUN + tl.arange(0, TILE // RUN)
                tl.store(ranks + runs, before.to(tl.int16))
            found += tl.sum(stays)
        if begin + SEGMENT >= end:
            tl.store(starts + 1, selected_before + found)


def count_by_segment(table: Table, smallest: Tensor, segment: int) -> tuple[Tensor, Tensor]:
    """Count the entries above the smallest selected bits, and those at them.

    Args:
        table: tensors, each at a multiple of 16 bytes; their sets do not matter.
        smallest: int32 [tensors], the smallest selected bits, at least 1.
        segment: entries of a segment.

    Returns:
        int64 [2, segments + 1]: how many are above, and at, in all segments before each one, where those of each
        tensor fill whole chunks; and int64 [2, tensors]: in each tensor.
    """
    segments = CHUNK // segment
    programs = table.chunk_tensors.numel() * segments
    counts = torch.empty(2, programs, dtype=torch.int64, device=smallest.device)
    _count_kernel[(programs,)](
        table.pointers, table.seconds, table.ends, table.first_chunks, table.chunk_tensors, smallest, counts,
        **table.constants, SEGMENT=segment, SEGMENTS=segments, TILE=TILE, num_warps=8,
    )  # fmt: skip
    sums = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    bounds = table.first_chunks[: table.num_tensors + 1] * segments
    return sums, sums.index_select(1, bounds).diff()


def place_(
    table: Table,
    smallest: Tensor,
    sums: Tensor,
    kept: Sequence[int],
    lookups: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    segment: int,
    run: int,
) -> None:
    """Write where what is selected lies.

    Args:
        table, smallest, segment: as of :func:`count_by_segment`.
        sums: what that gave.
        kept: how many of each tensor's ties stay.
        lookups: of each tensor, which are overwritten: see :class:`gmt_tune.masking.places.Lookup`.
        run: entries whose bits are counted together.
    """
    columns = [kept]
    columns += [
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in zip(*lookups, strict=True)
    ]
    columns += [[ranks is None for _, _, ranks in lookups]]
    placing = to_device([value for column in columns for value in column], smallest.device)
    segments = CHUNK // segment
    _place_kernel[(table.chunk_tensors.numel() * segments,)](
        table.pointers, table.seconds, table.ends, table.first_chunks, table.chunk_tensors, smallest, sums,
        len(lookups), placing, **table.constants, SEGMENT=segment, SEGMENTS=segments, RUN=run, TILE=TILE, num_warps=8,
    )  # fmt: skip
