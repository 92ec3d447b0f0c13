"""Tiles of Adam's moments: float32, or in 8 bits, read and written as torchao does it, bit for bit."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.search.kernels.tables import ALIGNMENT
from gmt_tune.optim.kernels.tiles import load, store
from gmt_tune.optim.states import is_8bit, is_quantized

AGES = {torch.int16: tl.int16, torch.int32: tl.int32}


def block_of(moment: Any) -> int:
    """Entries that share a scale; 0 for float32."""
    return moment.block_size if is_quantized(moment) else 0


def are_known(moments: Sequence[Any], beside: Sequence[Tensor], tile: int) -> bool:
    """Whether kernels can read moments, float32 or both ``OptimState8bit``, and what lies beside them.

    Args:
        moments: of as many entries each.
        beside: tensors whose memory must be readable in the same way.
        tile: entries that a program holds at a time.
    """
    if any(is_quantized(moment) != is_8bit(moment) or is_8bit(moment) != is_8bit(moments[0]) for moment in moments):
        return False
    block = block_of(moments[0])
    flat = [*_entries(moments), *beside]
    return (not block or tile % block == 0) and all(
        tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 for tensor in flat
    )


def tensors_of(moments: Sequence[Any]) -> list[Tensor]:
    """What a row of a table has of moments: their entries, and the scales of these or the same again."""
    return [*_entries(moments), *(moment.scale if block_of(moment) else moment for moment in moments)]


def _entries(moments: Sequence[Any]) -> list[Tensor]:
    return [moment.codes if block_of(moment) else moment for moment in moments]


@triton.jit
def read(pointer, scale, qmap, start, room, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A tile of a moment in float32."""
    if BLOCK == 0:
        values = load(pointer + start, room, 0.0, TILE)
    else:
        codes = load(pointer + start, room, 0, TILE).to(tl.int32)
        blocks = tl.arange(0, TILE // BLOCK)
        scales = tl.load(scale + start // BLOCK + blocks, mask=blocks * BLOCK < room, other=0.0)
        scaled = tl.reshape(tl.load(qmap + codes), (TILE // BLOCK, BLOCK)) * scales[:, None]
        values = tl.reshape(scaled, (TILE,))
    return values


@triton.jit
def write(pointer, scale, qmap, values, start, room, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Overwrite a tile of a moment: whole blocks, where it is in 8 bits."""
    if BLOCK == 0:
        store(pointer + start, values, room, TILE)
    else:
        rows = tl.reshape(values, (TILE // BLOCK, BLOCK))
        # Of magnitudes as integers, NaN is the largest, and stays
        largest = tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        scales = tl.where(largest < 1e-12, 1e-12, largest)
        blocks = tl.arange(0, TILE // BLOCK)
        tl.store(scale + start // BLOCK + blocks, scales, mask=blocks * BLOCK < room)
        codes = _nearest_codes(tl.reshape(tl.div_rn(rows, tl.broadcast_to(scales[:, None], rows.shape)), (TILE,)), qmap)
        store(pointer + start, codes.to(tl.uint8), room, TILE)


@triton.jit
def _nearest_codes(values, qmap):
    """As ``torchao.optim.quant_utils.quantize_8bit_with_qmap`` searches for them."""
    codes = tl.where(values >= tl.load(qmap + 128), 128, 0)
    for i in tl.static_range(1, 8):
        codes = tl.where(values >= tl.load(qmap + codes + (128 >> i)), codes + (128 >> i), codes)
    upper = tl.minimum(codes + 1, 255)
    below = tl.load(qmap + codes)
    return tl.where(values - below >= (tl.load(qmap + upper) - below) * 0.5, upper, codes)
