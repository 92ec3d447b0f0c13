"""What this process holds of a gradient, and which processes hold the rest.

Everything above sees parts alone, so that a whole gradient, FSDP2's and tensor parallelism's shards, ranges of flat
tensors, replicas, and uneven or empty shards are masked by the same code. ``torch.distributed.tensor``, which takes a
second to import, is imported only where a gradient is a DTensor (``dtensors``).
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.flat import FlatShard
from gmt_tune.masking.nonfinite import nonfinite_flags

__all__ = ["Part"]


@dataclass(frozen=True, eq=False)
class Part:
    """This process's entries of one gradient.

    Attributes:
        name: of the parameter.
        grad: the gradient: a plain tensor, a DTensor or a FlatShard.
        local: the entries that this process holds, sharing the gradient's memory.
        parameter: whose gradient it is; None where only values are ranked.
        groups: process groups; summing over the first, then the second, ... reaches every shard. Empty for a whole one.
        is_counted: whether this process's counts enter such sums: of several replicas, one is counted.
    """

    name: str
    grad: Tensor
    local: Tensor
    parameter: Tensor | None = None
    groups: tuple[Any, ...] = ()
    is_counted: bool = True

    @property
    def numel(self) -> int:
        """Entries of the whole gradient."""
        return self.grad.numel()

    @property
    def weight(self) -> Tensor:
        """The parameter's entries that ``local`` holds the gradient of."""
        assert self.parameter is not None
        return self.local_of(self.parameter.detach())

    def local_of(self, tensor: Tensor) -> Tensor:
        """The entries of another tensor of the gradient's shape at the places that ``local`` holds."""
        if not _is_dtensor(self.grad):
            return own_entries(tensor)
        from gmt_tune.masking import dtensors

        return dtensors.local_part(dtensors.with_placements_of(tensor, self.grad))

    def ranges(self) -> list[tuple[int, int]]:
        """For each dimension of the whole gradient, the range of indices that this process holds.

        Raises:
            NotImplementedError: if what it holds is no such block.
        """
        return index_ranges(self.grad)


def make_parts(parameters: Mapping[str, Tensor]) -> list[Part]:
    """The parts of all parameters that have a gradient.

    A gradient that tensor parallelism leaves otherwise, such as a sum over ranks that is still to be made, is first
    distributed as the parameter is.

    Args:
        parameters: by name; the same ones, in the same order, on all ranks.
    """
    trained = {name: p for name, p in parameters.items() if p.grad is not None}
    if any(_is_dtensor(p.grad) for p in trained.values()):
        from gmt_tune.masking import dtensors

        for p in trained.values():
            dtensors.distribute_as_parameter_(p)
    return [
        Part(name, grad, local, p, groups, is_counted)
        for (name, p), (grad, local, groups, is_counted) in zip(
            trained.items(), _shares([p.grad for p in trained.values()]), strict=True
        )
    ]


def part_of(tensor: Tensor, name: str = "") -> Part:
    """What this process holds of a tensor that is ranked or counted itself."""
    ((grad, local, groups, is_counted),) = _shares([tensor])
    return Part(name, grad, local, None, groups, is_counted)


def _shares(tensors: Sequence[Any]) -> list[tuple]:
    if any(_is_dtensor(tensor) for tensor in tensors):
        from gmt_tune.masking import dtensors

        return dtensors.shares(tensors)
    return [(t, own_entries(t), t.groups if isinstance(t, FlatShard) else (), True) for t in tensors]


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold some of it: a DTensor or a FlatShard."""
    return isinstance(tensor, FlatShard) or _is_dtensor(tensor)


def _is_dtensor(tensor: Any) -> bool:
    """Does not import DTensor to find out."""
    module = sys.modules.get("torch.distributed.tensor")  # where it is not imported, nothing is one
    return module is not None and isinstance(tensor, module.DTensor)


def own_entries(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    if isinstance(tensor, FlatShard):
        return tensor.local
    return tensor.detach().to_local() if _is_dtensor(tensor) else tensor.detach()


def index_ranges(tensor: Any) -> list[tuple[int, int]]:
    """For each dimension, the range of indices that this process holds; see :meth:`Part.ranges`."""
    if isinstance(tensor, FlatShard):
        return [tensor.held]
    if not _is_dtensor(tensor):
        return [(0, size) for size in tensor.shape]
    from gmt_tune.masking import dtensors

    return dtensors.local_ranges(tensor)


def own_ranges(tensor: Any) -> list[list[int]]:
    """The same in plain lists, to be saved; where the entries are no block, the process's place in the mesh."""
    try:
        return [list(bounds) for bounds in index_ranges(tensor)]
    except NotImplementedError:
        return [list(tensor.device_mesh.get_coordinate())]


def sum_over_ranks(rows: Sequence[Tensor], parts: Sequence[Part], *, is_small: bool = False) -> list[Tensor]:
    """Add up numbers over the shards that they were made of: one collective for all rows of the same processes.

    Args:
        rows: 1-d tensors, all int64 or all float32; those of a replica that is not counted are left out of the sum.
        parts: the part that each row belongs to.
        is_small: whether every sum is a count below 2**31; then half as many bytes travel.

    Returns:
        The sums, of the rows' dtype and in their order.
    """
    summed = list(rows)
    buckets: dict[tuple, list[int]] = {}
    for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
        if part.groups:
            buckets.setdefault((row.device, part.groups), []).append(i)
    for (_, groups), bucket in buckets.items():
        counted = [rows[i] if parts[i].is_counted else torch.zeros_like(rows[i]) for i in bucket]
        together = torch.cat(counted)
        dtype = together.dtype if together.is_floating_point() else torch.int64
        together = together.to(torch.int32 if is_small else dtype)
        device = together.device
        for group in groups:
            together = together.to(_device_for(group, device))
            torch.distributed.all_reduce(together, group=group)
        for i, row in zip(bucket, together.to(device, dtype).split([row.numel() for row in counted]), strict=True):
            summed[i] = row
    return summed


def _device_for(group: Any, device: torch.device) -> torch.device:
    """Where a group can add up what is on a device: NCCL cannot where an optimizer was offloaded to the CPU."""
    config = torch.distributed.get_backend_config(group)
    return device if f"{device.type}:" in config else torch.accelerator.current_accelerator() or device


def sum_counts(counts: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """Counts of the whole gradients from those of their parts, 0-d int64."""
    if not any(part.groups for part in parts):
        return list(counts)
    return [row.squeeze(0) for row in sum_over_ranks([count.long().view(1) for count in counts], parts)]


def nonfinite_gradients(parts: Iterable[Part]) -> list[Tensor]:
    """For each part a 0-d bool tensor: whether its gradient holds NaN or infinity, on any rank. Does not wait."""
    parts = list(parts)
    return on_any_rank(nonfinite_flags([part.local for part in parts]), parts)


def on_any_rank(flags: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """For each part whether the flag of it, 0-d bool, is set on any of the ranks that hold some of its gradient."""
    if not any(part.groups for part in parts):
        return list(flags)
    return [count > 0 for count in sum_counts(flags, parts)]
