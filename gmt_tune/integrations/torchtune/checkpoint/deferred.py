"""Tensors whose values are computed when they are written, one after the other, so that no two are in memory.

torchtune's checkpointer converts all weights of a model to Hugging Face's layout before it writes the first: with
deferred ones, it arranges what will be computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gmt_tune.reporting.safetensors_file import encode_header, write_file


class Deferred(Tensor):
    """A tensor with a shape, a dtype and strides; :meth:`read` computes its values.

    What an operation gives is deferred too. One that would change a tensor raises NotImplementedError.
    """

    _like: Tensor
    _read: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, read: Callable[[], Tensor]) -> Deferred:
        made = Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made._like, made._read = like, read
        return made

    @classmethod
    def to_come(cls, shape: torch.Size, dtype: torch.dtype, read: Callable[[], Tensor]) -> Deferred:
        """A contiguous tensor that ``read`` gives on the CPU."""
        return cls(torch.empty(shape, dtype=dtype, device="meta"), lambda: read().contiguous())

    def read(self) -> Tensor:
        """On the CPU; computed again in each call."""
        return self._read()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch documents it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} changes a tensor whose values are still to come")
        like = tree_map_only(Deferred, lambda deferred: deferred._like, (args, kwargs))

        def read() -> Any:
            values = tree_map_only(Deferred, lambda deferred: deferred.read(), (args, kwargs))
            return func(*values[0], **values[1])

        made = func(*like[0], **like[1])
        if isinstance(made, Tensor):
            return cls(made, read)
        return [cls(part, partial(lambda i: read()[i], i)) for i, part in enumerate(made)]  # of split, chunk, unbind

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({tuple(self.shape)}, {self.dtype})"


def as_deferred(tensor: Tensor) -> Deferred:
    """A tensor on the CPU as one that has come already; a deferred one as it is."""
    if isinstance(tensor, Deferred):
        return tensor
    return Deferred.to_come(tensor.shape, tensor.dtype, lambda: tensor.detach())


def save_file(tensors: dict[str, Tensor], filename: os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write the file that ``safetensors.torch.save_file`` would write, byte for byte, one tensor after the other.

    Args:
        tensors: deferred ones, or contiguous ones on the CPU.
    """
    # The library says in which order, and what it calls the dtypes
    small = save({name: torch.zeros(1, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata)
    header = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    names, end = [name for name in header if name != "__metadata__"], 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name].update(shape=list(tensors[name].shape), data_offsets=[begin, end])
    write_file(filename, encode_header(header), (_bytes_of(tensors[name]) for name in names))


def _bytes_of(tensor: Tensor) -> Any:
    values = tensor.read() if isinstance(tensor, Deferred) else tensor
    assert values.shape == tensor.shape and values.dtype == tensor.dtype
    return values.contiguous().view(-1).view(torch.uint8).numpy()
