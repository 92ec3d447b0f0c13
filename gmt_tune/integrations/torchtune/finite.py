"""Finds losses and gradients that are not finite, so that all ranks decide alike before any weight changes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def nonfinite_gradients(model: nn.Module, loss: Tensor) -> list[str] | None:
    """Whether the loss or any gradient on any rank holds NaN or infinity.

    One reading of the gradients and one reduction of a single number; names are exchanged only if there is
    something to name.

    Args:
        model: with its gradients.
        loss: 0-d, the same on all ranks.

    Returns:
        None if all is finite, else the names of the parameters, none of them twice; an empty list if it is
        only the loss.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    # A sum is finite if its terms are, far below the range of float32; it is the cheapest way to read them all
    sums = torch.stack([_local(grad).sum(dtype=torch.float32) for _, grad in named])
    bad = ~torch.isfinite(sums)
    count = bad.sum(dtype=torch.float32) + ~torch.isfinite(loss)
    if dist.get_world_size() > 1:
        dist.all_reduce(count)
    if count.item() == 0:
        return None
    mine = [name for (name, _), is_bad in zip(named, bad.tolist(), strict=True) if is_bad]
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return list(dict.fromkeys(name for names in of_all for name in names))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
