"""Zero, in place, what a packed selection does not hold, and count what it holds.

    x_i <- x_i if bit i % 8 of byte i // 8 is set else 0,   selected = number of bits that are set

One read and one write of the entries. The sign and payload of what stays are not touched.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.reading import load_tile
from gmt_tune.masking.search.kernels.tables import CHUNK, Table, to_device

TILE = 1 << 12  # entries that a program holds at a time: 16 a thread


@triton.jit
def _apply_packed_kernel(
    pointers, ends, first_chunks, chunk_tensors, packed, selected,
    FIRST_INT: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    end = tl.load(ends + tensor)
    pointer = tl.multiple_of(tl.load(pointers + tensor).to(tl.pointer_type(FIRST_INT)), 16)
    packed_pointer = tl.load(packed + tensor).to(tl.pointer_type(tl.uint8))
    begin = (chunk - tl.load(first_chunks + tensor)) * (TILE * TILES)
    offsets = tl.arange(0, TILE)
    octets = tl.arange(0, TILE // 8)
    stayed = tl.zeros([TILE], tl.int32)
    for i in range(TILES):
        start = begin + i * TILE
        if start < end:
            high = tl.minimum(end - start, TILE).to(tl.int32)
            entries, _ = load_tile(pointer + start, pointer + start, 0, high, TILE, False)
            held = tl.load(packed_pointer + start // 8 + octets, mask=octets * 8 < high, other=0).to(tl.int32)
            kept = tl.reshape((held[:, None] >> tl.arange(0, 8)[None, :]) & 1, (TILE,))
            result = tl.where(kept != 0, entries, tl.zeros_like(entries))
            if high >= TILE:
                stayed += kept
                tl.store(pointer + start + offsets, result)
            else:
                stayed += tl.where(offsets < high, kept, 0)
                tl.store(pointer + start + offsets, result, mask=offsets < high)
    tl.atomic_add(selected + tensor, tl.sum(stayed).to(tl.int64), sem="relaxed")


def apply_packed_(table: Table, packed: Sequence[Tensor]) -> Tensor:
    """Apply a packed selection to each tensor of a table.

    Args:
        table: tensors, each at a multiple of 16 bytes; their sets do not matter.
        packed: for each tensor uint8 [ceil(numel / 8)], as ``pack_`` lays them out.

    Returns:
        int64 [tensors]: how many entries of each stayed.
    """
    device = table.pointers.device
    selected = torch.zeros(table.num_tensors, dtype=torch.int64, device=device)
    addresses = to_device([bits.data_ptr() for bits in packed], device)
    _apply_packed_kernel[(table.chunk_tensors.numel(),)](
        table.pointers, table.ends, table.first_chunks, table.chunk_tensors, addresses, selected,
        FIRST_INT=table.constants["FIRST_INT"], TILE=TILE, TILES=CHUNK // TILE, num_warps=8,
    )  # fmt: skip
    return selected
