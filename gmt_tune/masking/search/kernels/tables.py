"""Which entries a launch covers: tables of pointers to tensors, and a list of chunks, one for each program.

A tensor may begin anywhere, as views into a flat buffer do, while loads are fast only from multiples of 16
bytes on. So entries are addressed from the multiple of 16 bytes at or before a tensor's first one, and the
``lead`` entries in between are left out. Offsets are 64 bits wide.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.bits import INFINITY_BITS, MAGNITUDE_MASK, flat_view
from gmt_tune.masking.search.entries import Product

CHUNK = 1 << 17  # entries of a program
ALIGNMENT = 16  # bytes

_FLOAT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INT = {torch.float32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.int16}


@dataclass
class Table:
    """Tensors of one dtype on one device, in sets whose entries are ranked together.

    All tensors are on that device; int64 columns except the last one, which is int32; rows are padded to an even
    length.

    Attributes:
        pointers, seconds: [tensors], addresses; the second tensor is a weight or a score of the same shape, or
            the first again.
        leads, ends: [tensors]; the entries are those from ``lead`` to ``end - 1`` after the pointer.
        starts: [tensors + 1], how many entries lie before each tensor.
        first_chunks: [tensors + 1], the chunk with which each tensor begins.
        sets: [tensors], to which set each tensor belongs.
        set_bounds: [sets + 1]; a set's tensors are those from one bound to the next.
        chunk_tensors: int32 [chunks], to which tensor each chunk belongs.
        num_tensors: of all sets.
        largest_set: number of its tensors.
        constants: what the kernels are compiled for.
    """

    pointers: Tensor
    seconds: Tensor
    leads: Tensor
    ends: Tensor
    starts: Tensor
    first_chunks: Tensor
    sets: Tensor
    set_bounds: Tensor
    chunk_tensors: Tensor
    num_tensors: int
    largest_set: int
    constants: dict[str, object]


def is_covered(tensor: Tensor | Product) -> bool:
    """Whether the entries lie in memory without gaps: then their order does not matter."""
    if isinstance(tensor, Product):
        return tensor.grad.is_contiguous() and tensor.weight.is_contiguous()
    return tensor.is_contiguous() or flat_view(tensor) is not None


def make_table(sets: Sequence[Sequence[Tensor | Product]], scores: Sequence[Any] | None = None) -> Table:
    """A table of tensors that are covered, not empty, of one dtype (also their weights) and on one device.

    Args:
        sets: tensors whose entries are ranked together.
        scores: what the entries of each tensor are ranked by, where that is not the tensor itself: as many as
            tensors, contiguous as these are, and of one dtype.
    """
    members: list[Any] = [member for one in sets for member in one]
    firsts = [m.grad if isinstance(m, Product) else m for m in members]
    products = isinstance(members[0], Product)
    seconds = [m.weight for m in members] if products else list(scores or firsts)
    dtype, second_dtype = firsts[0].dtype, seconds[0].dtype
    score_dtype = members[0].dtype if products else second_dtype

    addresses, sizes = [t.data_ptr() for t in firsts], [t.numel() for t in firsts]
    width, second_width = dtype.itemsize, second_dtype.itemsize
    leads = [address % ALIGNMENT // width for address in addresses]
    ends = [lead + size for lead, size in zip(leads, sizes, strict=True)]
    pointers = second_pointers = [address - lead * width for address, lead in zip(addresses, leads, strict=True)]
    if products or scores is not None:
        second_pointers = [t.data_ptr() - lead * second_width for t, lead in zip(seconds, leads, strict=True)]
    chunks = [-(-end // CHUNK) for end in ends]
    first_chunks = _running_sums(chunks)
    columns = [
        pointers,
        second_pointers,
        leads,
        ends,
        _running_sums(sizes),
        first_chunks,
        [i for i, one in enumerate(sets) for _ in one],
        _running_sums([len(one) for one in sets]),
        chunks,
    ]
    device = firsts[0].device
    # Of even lengths, so that all begin at multiples of 16 bytes, which Triton compiles for
    padded = [[*column, 0] if len(column) % 2 else column for column in columns]
    flat = to_device([value for column in padded for value in column], device)
    on_device: Any
    *on_device, chunks_on_device = flat.split([len(column) for column in padded])
    # Told the size, repeat_interleave does not wait for the device
    tensors = torch.arange(len(members), dtype=torch.int32, device=device)
    chunk_tensors = tensors.repeat_interleave(chunks_on_device[: len(members)], output_size=first_chunks[-1])
    return Table(  # type: ignore[call-arg, misc]
        *on_device,
        chunk_tensors,
        num_tensors=len(members),
        largest_set=max(len(one) for one in sets),
        constants=dict(
            RANKED_BY="product" if products else "first" if scores is None else "second",
            FIRST=_FLOAT[dtype],
            FIRST_INT=_INT[dtype],
            SECOND=_FLOAT[second_dtype],
            SECOND_INT=_INT[second_dtype],
            SCORE=_FLOAT[score_dtype],
            SCORE_INT=_INT[score_dtype],
            MASK=MAGNITUDE_MASK[score_dtype],
            NAN=INFINITY_BITS[score_dtype] + 1,
            SECOND_ALIGNED=all(pointer % ALIGNMENT == 0 for pointer in second_pointers),
        ),
    )


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor, copied from pinned memory so that the host does not wait for the device."""
    host = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _running_sums(values: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(values)]
