"""Finds losses and gradients that are not finite, so that all ranks decide alike before any weight changes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


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
    sums = {name: _sum(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return _names_of_all_ranks(sums, loss)


class SteppedGradients:
    """The same for optimizers inside backward: they step before all gradients are there, so it is told afterwards.

    Args:
        model: whose parameters they step.
        optimizers: all of them.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        self._names = {p: name for name, p in model.named_parameters()}
        self._sums: dict[str, Tensor] = {}
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._read)

    def _read(self, optimizer: Optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._sums[self._names[p]] = _sum(p.grad)

    def nonfinite(self) -> list[str] | None:
        """Names as of :func:`nonfinite_gradients`, for the backward pass that has just been; all ranks call it."""
        sums, self._sums = self._sums, {}
        return _names_of_all_ranks(sums, torch.zeros((), device=next(iter(self._names)).device))


def _sum(grad: Tensor) -> Tensor:
    """Finite if all entries are, far below the range of float32: the cheapest way to read them all. 0-d, float32."""
    return (grad.to_local() if isinstance(grad, DTensor) else grad).sum(dtype=torch.float32)


def _are_bad(loss: Tensor, sums: list[Tensor]) -> Tensor:
    """Of the loss and then of each sum, whether it is NaN or infinite, on the loss's device. bool, [1 + sums]."""
    bad = ~torch.isfinite(loss.detach().reshape(1))
    if not sums:
        return bad
    # With fsdp_cpu_offload, gradients are on the CPU and the loss is not
    return torch.cat([bad, ~torch.isfinite(torch.stack(sums)).to(loss.device)])


def _names_of_all_ranks(sums: dict[str, Tensor], loss: Tensor) -> list[str] | None:
    bad = _are_bad(loss, list(sums.values()))
    count = bad.sum(dtype=torch.float32)
    if dist.get_world_size() > 1:
        dist.all_reduce(count)
    if count.item() == 0:
        return None
    mine = [name for name, is_bad in zip(sums, bad[1:].tolist(), strict=True) if is_bad]
    of_all: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return list(dict.fromkeys(name for names in of_all for name in names))
