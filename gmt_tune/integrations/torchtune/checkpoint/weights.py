"""A model's weights on rank 0, whole: each when it is asked for, or a copy of all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune import training

from gmt_tune.errors import one_line
from gmt_tune.integrations.torchtune.checkpoint.deferred import Deferred
from gmt_tune.integrations.torchtune.checkpoint.writer import LostRank

# Until the lock of a rank that a collective has lost is seen to be free.
_UNTIL_SEEN_S = 2.0


def copied(model: nn.Module, device: torch.device, *, keep: bool) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0, gathered by all ranks; an empty dict on the others.

    Args:
        device: of the process.
        keep: the values of now, also when training changes those that are on the CPU anyway.
    """
    whole = training.gather_cpu_state_dict(model, dist.get_rank() == 0, device=device)
    if keep and device.type == "cpu":
        is_own = {name: not isinstance(p, DTensor) for name, p in model.state_dict().items()}
        whole = {name: weight.clone() if is_own[name] else weight for name, weight in whole.items()}
    return whole


@contextlib.contextmanager
def one_by_one(model: nn.Module, device: torch.device, look: Callable[[], None]) -> Iterator[dict[str, Tensor]]:
    """On rank 0: the weights, deferred, each to be gathered from all ranks when it is read; on the others, nothing.

    The other ranks give their parts at the end of the block, also after an error in it, until rank 0 has left its own.

    Args:
        device: of the process.
        look: called before all ranks meet.

    Raises:
        LostRank: that ``look`` raised, or when the ranks have not met.
    """
    if device.type != "cpu" and dist.get_world_size() > 1:
        torch.get_device_module(device).set_device(device)  # each thread has its own, and collectives take it
    parts = model.state_dict()
    names, is_together = list(parts), True

    def meet(number: int) -> int:
        """Let rank 0 say which weight is next; all begin when all are here."""
        said = torch.tensor([number], device=device)
        if dist.get_world_size() > 1:
            dist.all_reduce(said)
        return int(said)

    @torch.no_grad()
    def whole(name: str) -> Tensor:
        part = parts[name]
        part = part.to(device) if part.is_cpu else part  # fsdp_cpu_offload
        return part.full_tensor() if isinstance(part, DTensor) else part

    def to_come(name: str) -> Deferred:
        return Deferred.to_come(parts[name].shape, parts[name].dtype, lambda: read(name))

    def read(name: str) -> Tensor:
        nonlocal is_together
        look()
        is_together = False
        try:
            meet(names.index(name))
            gathered = whole(name)
        except Exception as error:
            time.sleep(_UNTIL_SEEN_S)
            look()
            raise LostRank(f"its weights could not be gathered ({one_line(error, with_type=True)})") from error
        is_together = True
        return gathered.cpu()

    if dist.get_rank() == 0:
        try:
            yield {name: to_come(name) for name in names}
        except LostRank:
            is_together = False
            raise
        finally:
            if is_together:
                meet(len(names))
    else:
        try:
            yield {}
        finally:
            threading.current_thread().name = "checkpoint-gatherer"  # with nothing left to complete by itself
            while (number := meet(0)) < len(names):
                whole(names[number])
