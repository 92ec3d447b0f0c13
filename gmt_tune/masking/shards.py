"""Saved selections of parameters of which a rank may hold a part: which part it was, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.dtensor import any_sharded


def own_entries(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.detach().to_local() if any_sharded([tensor]) else tensor.detach()


def own_ranges(tensor: Any) -> list[list[int]]:
    """Which entries of a tensor this rank holds: for each dimension, the first index and the one behind the last.

    Where they form no such block, the rank's place in the mesh stands for them.
    """
    if not any_sharded([tensor]):
        return [[0, size] for size in tensor.shape]
    from gmt_tune.masking.layout import local_ranges

    try:
        return [list(bounds) for bounds in local_ranges(tensor)]
    except NotImplementedError:
        return [list(tensor.device_mesh.get_coordinate())]


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
