"""A selection that outlives a step, kept at 1 bit per entry."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gmt_tune.masking.bits import INT_DTYPE, magnitude_bits, row_major_blocks, smallest_selected_bits
from gmt_tune.masking.saliency import Saliency

_BLOCK = {"cpu": 1 << 18, "other": 1 << 21}  # entries packed at a time: bounds the passing memory
# Multiplying 8 bytes of 0 or 1 by this gathers them, in order, in the product's upper byte
_GATHER = 0x0102040810204080


def pack_selection(selected: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into bits.

    Returns:
        1-d uint8 tensor of ``ceil(numel / 8)`` bytes; entry ``i`` (row-major) is bit ``i % 8`` of byte
        ``i // 8``.
    """
    flat = selected.reshape(-1)
    packed = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), _block(flat)):
        _pack_into(packed, start, flat[start : start + _block(flat)])
    return packed


def _part(flat: Tensor | Saliency, part: slice) -> Tensor:
    return flat.read(lambda t: t[part]) if isinstance(flat, Saliency) else flat[part]


def pack_selected(score: Tensor | Saliency, threshold: Tensor) -> Tensor:
    """``pack_selection(selection(score, threshold))`` without ever holding the bool tensor."""
    packed = torch.empty((score.numel() + 7) // 8, dtype=torch.uint8, device=score.device)
    smallest = smallest_selected_bits(threshold.to(score.device), score.dtype)
    if isinstance(score, Saliency):
        flat = Saliency(score.grad.reshape(-1), score.weight.reshape(-1))
    else:
        flat = score.detach().reshape(-1)
    for start in range(0, flat.numel(), _block(flat)):
        part = slice(start, start + _block(flat))
        bits = magnitude_bits(_part(flat, part))
        _pack_into(packed, start, bits >= smallest)
    return packed


def unpack_selection(packed: Tensor, numel: int) -> Tensor:
    """The bool tensor, flat, that :func:`pack_selection` packed."""
    return _unpack(packed)[:numel]


@torch.no_grad()
def apply_packed_(grad: Tensor, packed: Tensor) -> Tensor:
    """Zero, in place, all entries of a gradient that a packed selection does not hold.

    Returns:
        0-d int64 tensor: how many entries the selection holds.
    """
    count = torch.zeros((), dtype=torch.int64, device=grad.device)
    for start, block in row_major_blocks(grad, _block(grad)):
        stop = start + block.numel()
        kept = _unpack(packed[start // 8 : (stop + 7) // 8])[start % 8 :][: block.numel()].view(block.shape)
        bits = block.view(INT_DTYPE[grad.dtype])
        kept = kept.to(bits.dtype)
        count += kept.sum(dtype=torch.int32)
        bits.mul_(kept)
    return count


def _block(tensor: Tensor | Saliency) -> int:
    return _BLOCK["cpu" if tensor.device.type == "cpu" else "other"]


def _pack_into(packed: Tensor, start: int, selected: Tensor) -> None:
    """Pack entries from ``start``, a multiple of 8, on."""
    n = selected.numel()
    if n % 8:
        selected = torch.nn.functional.pad(selected, (0, -n % 8))
    words = selected.contiguous().view(torch.int64)
    packed[start // 8 : start // 8 + words.numel()] = (words * _GATHER) >> 56


def _unpack(packed: Tensor) -> Tensor:
    return _bytes_of_bits(packed.device).index_select(0, packed.to(torch.int32)).view(torch.bool)


@functools.lru_cache(maxsize=8)
def _bytes_of_bits(device: torch.device) -> Tensor:
    """For each byte, 8 bytes that hold its bits from the lowest on, as an int64."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1).to(device)
