"""Tensors of any shape, stride and dtype as one set of entries, to be read in blocks or sampled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gmt_tune.masking.bits import blocks, flat_view

RUN = 4  # a sample is taken in runs of so many neighbours: cheaper than one by one, and nearly as random


class Entries:
    """Tensors as one set of entries of one dtype: theirs, or float32 where they differ."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtype = tensors[0].dtype
        if any(t.dtype != self.dtype for t in tensors):
            self.dtype = torch.float32
        self.numel = sum(t.numel() for t in tensors)
        self._tensors = [flat if (flat := flat_view(t)) is not None else t.detach() for t in tensors]

    def blocks(self, size: int) -> Iterator[Tensor]:
        """At most ``size`` entries at a time; 1-d where memory has no gaps."""
        for tensor in self._tensors:
            for block in blocks(tensor, size) if tensor.numel() > size else (tensor,):
                yield block.to(self.dtype)

    def sample(self, size: int) -> Tensor:
        """All entries, or about ``size`` random ones where there are more, 1-d; always the same positions."""
        parts = []
        for tensor in self._tensors:
            m = max(RUN, size * tensor.numel() // self.numel)
            if tensor.numel() <= m:
                part = tensor.reshape(-1)
            elif tensor.dim() == 1:
                runs = tensor[: tensor.numel() // RUN * RUN].view(-1, RUN)
                part = runs.index_select(0, _positions(runs.shape[0], m // RUN)).view(-1)
            else:
                part = tensor[torch.unravel_index(_positions(tensor.numel(), m), tensor.shape)]
            parts.append(part.to(self.dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@functools.lru_cache(maxsize=16)
def _positions(n: int, m: int) -> Tensor:
    """m random positions below n, in ascending order, one in each of m equal parts; always the same ones."""
    generator = torch.Generator().manual_seed(n)
    parts = torch.arange(m, dtype=torch.float64) + torch.rand(m, dtype=torch.float64, generator=generator)
    return (parts * (n / m)).to(torch.int64).clamp_(max=n - 1)
