"""A selection that outlives a step, kept at 1 bit per entry."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gmt_tune.masking.bits import INT_DTYPE, row_major_blocks
from gmt_tune.masking.parts import own_entries, own_ranges
from gmt_tune.masking.search.entries import Product

__all__ = ["pack_selection"]

_BLOCK = {"cpu": 1 << 18, "other": 1 << 21}  # entries packed at a time: bounds the passing memory
# Multiplying 8 bytes of 0 or 1 by this gathers them, in order, in the product's upper byte
_GATHER = 0x0102040810204080


def pack_selection(entries: Tensor | Product, is_selected: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Pack a selection of a tensor's entries into bits, without ever holding it as a bool tensor.

    Args:
        entries: of any shape; bool, True where selected, unless ``is_selected`` is given.
        is_selected: makes the bool tensor of a 1-d block of entries.

    Returns:
        1-d uint8 tensor of ``ceil(numel / 8)`` bytes; entry ``i`` (row-major) is bit ``i % 8`` of byte
        ``i // 8``.
    """
    if isinstance(entries, Product):
        flat: Tensor | Product = Product(entries.grad.reshape(-1), entries.weight.reshape(-1))
    else:
        flat = entries.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8, device=flat.device)
    size = _block(flat)
    for start in range(0, flat.numel(), size):
        part = slice(start, start + size)
        block = flat.read(lambda t: t[part]) if isinstance(flat, Product) else flat[part]  # noqa: B023
        _pack_into(packed, start, block if is_selected is None else is_selected(block))
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


def check_saved_bits(name: str, packed: object, p: Tensor, shards: Mapping[str, list]) -> None:
    """Raise ValueError unless a saved selection is of the entries that this rank holds of a parameter.

    Args:
        name: of the parameter.
        packed: its selection, as ``pack_selection`` packs it.
        p: the parameter.
        shards: by name, what :func:`own_ranges` said where it was saved; states of earlier releases lack it.
    """
    own = own_ranges(p)
    if shards.get(name, own) != own:
        raise ValueError(
            f"the selection of '{name}' was saved by a rank that held the entries {shards[name]} of it, and this one "
            f"holds {own}: save and load one state on each rank, as they were sharded then"
        )
    numel = own_entries(p).numel()
    wanted = (numel + 7) // 8
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.shape != (wanted,):
        found = f"{packed.dtype} {tuple(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        raise ValueError(
            f"the saved selection of '{name}' does not fit: {numel} entries take uint8 ({wanted},), and it is {found}: "
            "load the state of the same model, sharded as it was when it was saved"
        )


def _block(tensor: Tensor | Product) -> int:
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
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)
