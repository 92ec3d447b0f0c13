"""Floats seen as integers: the magnitude of an IEEE float orders like its bits without the sign.

Zero is 0, infinity lies above every finite value and NaN above infinity, as in ``torch.sort``. Everything
that ranks entries in this package compares such integers, so it is exact and does not depend on rounding.
"""

import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

INT_DTYPE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
MAGNITUDE_MASK = {torch.float32: 0x7FFFFFFF, torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF}
INFINITY_BITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
NAN_BITS = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def magnitude_bits(tensor: Tensor) -> Tensor:
    """The bits of each entry without the sign: int32 for float32, int16 for the 16-bit dtypes; a new tensor."""
    return tensor.detach().view(INT_DTYPE[tensor.dtype]) & MAGNITUDE_MASK[tensor.dtype]


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of ``dtype`` with these magnitude bits (any integer dtype)."""
    return bits.to(INT_DTYPE[dtype]).view(dtype)


def bits_to_float(bits: int, dtype: torch.dtype) -> float:
    """The value with these magnitude bits as a Python float."""
    if dtype == torch.float16:
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits if dtype == torch.float32 else bits << 16))[0]


def smallest_selected_bits(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitude bits from which entries of ``dtype`` are selected: threshold rounded up, at least 1.

    A threshold measured over tensors of several dtypes is float32; rounding it down to the 16 bits of one
    of them would select entries below it. At least 1, because zeros are never selected.

    Args:
        threshold: 0-d, not negative; NaN selects only NaN.
        dtype: of the entries.

    Returns:
        0-d int32 tensor on the threshold's device; does not wait for it.
    """
    rounded = threshold.detach().to(dtype)
    bits = magnitude_bits(rounded).to(torch.int32)
    if threshold.dtype != dtype:
        bits += rounded.to(torch.float32) < threshold.to(torch.float32)
    bits = torch.where(threshold.isnan(), INFINITY_BITS[dtype] + 1, bits)
    return bits.clamp(min=1).to(torch.int32)


def flat_view(tensor: Tensor) -> Tensor | None:
    """All entries as a 1-d view in the order of memory, or None where memory has gaps."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.view(-1) if tensor.is_contiguous() else None


def blocks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Views of at most ``size`` entries that cover the tensor once, in any order and of any shape."""
    flat = flat_view(tensor)
    for (block,) in blocks_of_each([tensor.detach() if flat is None else flat], size):
        yield block


def blocks_of_each(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The same for several tensors of one shape: each tuple holds their views of the same entries."""
    tensors = [t.detach() for t in tensors]
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(size) for t in tensors), strict=True)
    elif tensors[0].numel() <= size:
        yield tuple(tensors)
    else:
        longest = max(range(tensors[0].dim()), key=tensors[0].size)
        for halves in zip(*(t.tensor_split(2, dim=longest) for t in tensors), strict=True):
            yield from blocks_of_each(halves, size)


def row_major_blocks(tensor: Tensor, size: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Views of at most ``size`` entries in row-major order, each with the flat index of its first entry."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        for i, block in enumerate(tensor.view(-1).split(size)):
            yield start + i * size, block
    elif tensor.numel() <= size:
        yield start, tensor
    elif tensor.shape[0] == 1:
        yield from row_major_blocks(tensor[0], size, start)
    else:
        for half in tensor.tensor_split(2):
            yield from row_major_blocks(half, size, start)
            start += half.numel()
