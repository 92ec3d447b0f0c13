"""Applies a delta to a model in memory, in place, and takes it back."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmt_tune.deltas.file_format import INT_DTYPES, Delta, Pair
from gmt_tune.errors import UserError
from gmt_tune.reporting.safetensors_file import torch_dtype


@torch.no_grad()
def apply_delta_(tensors: Mapping[str, Tensor], delta: Delta | str | Path, *, remove: bool = False) -> None:
    """Turn the weights of a delta's base into those of the tuned model, in place; or, with ``remove``, back.

    Only the entries that differ are touched. These are checked against the delta first, so that a model which is not
    the base, or has the delta already, stays as it was.

    Args:
        tensors: by the names in the model's files, such as ``model.state_dict()``; contiguous, of the dtype in
            which the tuned model was saved, on any device.
        delta: the file.
        remove: take it back.

    Raises:
        UserError: if a tensor is missing, or not the one that the delta was made from.
    """
    delta = delta if isinstance(delta, Delta) else Delta(delta)
    changed = _present(tensors, delta)
    for name, (tensor, pair) in changed.items():
        if _crc32(tensor, delta, pair) != pair.crc32[remove]:
            state = "does not have this delta" if remove else "is not the base, or has this delta already"
            raise UserError(f"the model {state}: {name} has other values than {delta.path} was made from")
    for tensor, pair in changed.values():
        flat = _bits(tensor)
        for at, bits in _changes(flat, delta, pair):
            flat[at] ^= torch.from_numpy(bits).to(flat.device)


def _present(tensors: Mapping[str, Tensor], delta: Delta) -> dict[str, tuple[Tensor, Pair]]:
    """The tensors that change, each once."""
    found: dict[str, tuple[Tensor, Pair]] = {}
    places: set[int] = set()
    for name, pair in delta.changed_tensors().items():
        tensor, dtype, info = tensors.get(name), delta.dtype(pair), delta.info("tuned", pair)
        assert info is not None
        if tensor is None:
            raise UserError(f"the model has no {name}, which {delta.path} changes: it was made from another model")
        if tensor.shape != info.shape or torch_dtype(dtype) != tensor.dtype:
            raise UserError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} in the model and {dtype} "
                f"{list(info.shape)} in {delta.path}: load the model that it was made from, in the tuned one's dtype"
            )
        if type(tensor.detach()) is not Tensor or not tensor.is_contiguous():
            raise UserError(
                f"{name} is sharded, quantized or not contiguous in the model, and a delta changes plain tensors: load "
                "the model whole, or the folder that `gmt-tune apply` makes"
            )
        if tensor.data_ptr() not in places:  # else tied to one that is there
            found[name] = tensor, pair
            places.add(tensor.data_ptr())
    return found


def _crc32(tensor: Tensor, delta: Delta, pair: Pair) -> int:
    """Of the bits that the entries which a delta changes have in a model."""
    flat, crc32 = _bits(tensor), 0
    for at, _ in _changes(flat, delta, pair):
        crc32 = zlib.crc32(flat[at].cpu().numpy().data, crc32)
    return crc32


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(INT_DTYPES[tensor.element_size()])


def _changes(flat: Tensor, delta: Delta, pair: Pair) -> Iterator[tuple[Tensor, np.ndarray]]:
    for start, _, (indices, bits) in delta.blocks(pair):
        yield torch.from_numpy(indices).to(flat.device) + start, bits
