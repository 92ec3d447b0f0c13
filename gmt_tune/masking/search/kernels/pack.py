"""Keep what a threshold selects at 1 bit per entry.

    bit i % 8 of byte i // 8 = bits(score_i) >= smallest

One read of the entries and one write of an eighth of a byte each; i counts them in row-major order.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import as_pointers, load_tile, magnitude_bits
from gmt_tune.masking.search.kernels.tables import CHUNK, Table, to_device

TILE = 1 << 12  # entries that a program holds at a time: 16 a thread


@triton.jit
def _pack_kernel(
    pointers, seconds, ends, first_chunks, chunk_tensors, smallest, packed,
    RANKED_BY: tl.constexpr, FIRST: tl.constexpr, FIRST_INT: tl.constexpr, SECOND: tl.constexpr,
    SECOND_INT: tl.constexpr, SCORE: tl.constexpr, SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
    SECOND_ALIGNED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    end = tl.load(ends + tensor)
    least = tl.load(smallest + tensor)
    first_pointer, second_pointer = as_pointers(
        tl.load(pointers + tensor), tl.load(seconds + tensor), FIRST_INT, SECOND_INT, SECOND_ALIGNED
    )
    packed_pointer = tl.load(packed + tensor).to(tl.pointer_type(tl.uint8))
    begin = (chunk - tl.load(first_chunks + tensor)) * (TILE * TILES)
    for i in range(TILES):
        start = begin + i * TILE
        if start < end:
            high = tl.minimum(end - start, TILE).to(tl.int32)
            first, second = load_tile(
                first_pointer + start, second_pointer + start, 0, high, TILE, RANKED_BY != "first"
            )
            kept = magnitude_bits(first, second, RANKED_BY, FIRST, SECOND, SCORE, SCORE_INT, MASK, NAN) >= least
            # What lies behind the last entry was loaded as 0, and is never selected
            octets = tl.sum(tl.reshape(kept.to(tl.int32), (TILE // 8, 8)) << tl.arange(0, 8)[None, :], 1)
            offsets = tl.arange(0, TILE // 8)
            tl.store(packed_pointer + start // 8 + offsets, octets.to(tl.uint8), mask=offsets * 8 < high)


def pack_(table: Table, smallest: Tensor, packed: Sequence[Tensor]) -> None:
    """Pack the selection of each tensor of a table.

    Args:
        table: tensors, each at a multiple of 16 bytes; their sets do not matter.
        smallest: int32 [tensors], the smallest selected bits, at least 1.
        packed: for each tensor uint8 [ceil(numel / 8)], which is overwritten.
    """
    addresses = to_device([bits.data_ptr() for bits in packed], smallest.device)
    _pack_kernel[(table.chunk_tensors.numel(),)](
        table.pointers, table.seconds, table.ends, table.first_chunks, table.chunk_tensors, smallest, addresses,
        **table.constants, TILE=TILE, TILES=CHUNK // TILE, num_warps=8,
    )  # fmt: skip
