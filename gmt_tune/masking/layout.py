"""How a sharded gradient lies over the ranks: the part of it that this rank holds, and who shares the rest.

Knows DTensors of any mesh: FSDP2's and tensor parallelism's shards, replicas, uneven and empty shards. What
is counted and selected there is told in ``sharded``. Importing this imports ``torch.distributed.tensor``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


class Layout(NamedTuple):
    """One gradient as this rank sees it.

    Attributes:
        local: the entries that this rank holds; shares memory with the gradient.
        groups: process groups; summing over the first, then the second, ... reaches every shard.
        is_counted: whether what this rank counts enters the sum: of several replicas, one is counted.
    """

    local: Tensor
    groups: tuple[dist.ProcessGroup, ...]
    is_counted: bool


def local_part(tensor: Any) -> Tensor:
    """The entries of a tensor that this rank holds, sharing its memory; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    local = detached.to_local()
    # What a collective is still filling says so by a subclass of Tensor that can be waited for
    return local.wait() if hasattr(local, "trigger_wait") else local


def layouts(tensors: Sequence[Tensor]) -> list[Layout]:
    """The layout of each tensor; tensors on one mesh get the same groups, so that they can share collectives.

    Args:
        tensors: DTensors and plain tensors, in the same order on all ranks.
    """
    # Replicas on every tensor's behalf need no sum: with HSDP, only the dimension that shards is reduced over
    dims: dict[DeviceMesh, set[int]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            dims.setdefault(tensor.device_mesh, set()).update(sharding_dims(tensor))
    groups = {mesh: _groups(mesh, sorted(used)) for mesh, used in dims.items()}
    found = []
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            found.append(Layout(tensor.detach(), (), True))
            continue
        mesh = tensor.device_mesh
        replicated = dims[mesh] - set(sharding_dims(tensor))
        is_counted = all(mesh.get_local_rank(dim) == 0 for dim in replicated)
        found.append(Layout(local_part(tensor), groups[mesh], is_counted))
    return found


def sharding_dims(tensor: DTensor) -> list[int]:
    """The mesh dimensions over which a tensor is cut into more than one part."""
    mesh = tensor.device_mesh
    return [dim for dim, p in enumerate(tensor.placements) if _is_shard(p) and mesh.size(dim) > 1]


def _groups(mesh: DeviceMesh, dims: list[int]) -> tuple[dist.ProcessGroup, ...]:
    """One group where there is one: a dimension's own, or that of all ranks. Else a group for each dimension."""
    world = dist.group.WORLD
    if world is not None and len(dims) > 1 and math.prod(mesh.size(dim) for dim in dims) == world.size():
        return (world,)
    return tuple(mesh.get_group(dim) for dim in dims)


def sum_over_ranks(rows: Sequence[Tensor], layouts: Sequence[Layout], is_small: bool) -> list[Tensor]:
    """Add up counts over the shards that they were made of: one collective for all rows of a mesh.

    Args:
        rows: 1-d int64 tensors; those of a replica that is not counted are left out of the sum.
        layouts: of the tensor that each row belongs to.
        is_small: whether every sum is below 2**31; then half as many bytes travel.

    Returns:
        The sums: int64, in the order of the rows.
    """
    summed = list(rows)
    buckets: dict[tuple, list[int]] = {}
    for i, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
        if layout.groups:
            buckets.setdefault((row.device, layout.groups), []).append(i)
    for (_, groups), bucket in buckets.items():
        parts = [rows[i] if layouts[i].is_counted else torch.zeros_like(rows[i]) for i in bucket]
        together = torch.cat(parts).to(torch.int32 if is_small else torch.int64)
        for group in groups:
            dist.all_reduce(together, group=group)
        for i, row in zip(bucket, together.long().split([part.numel() for part in parts]), strict=True):
            summed[i] = row
    return summed


def local_ranges(tensor: Tensor) -> list[tuple[int, int]]:
    """For each dimension of the whole tensor, the range of indices that this rank holds.

    Raises:
        NotImplementedError: if what it holds is no such block.
    """
    if not isinstance(tensor, DTensor):
        return [(0, size) for size in tensor.shape]
    mesh = tensor.device_mesh
    ranges = []
    for dim, size in enumerate(tensor.shape):
        cuts = [i for i, p in enumerate(tensor.placements) if _is_shard(p) and p.dim % tensor.dim() == dim]  # type: ignore[attr-defined]
        # FSDP2 cuts what tensor parallelism has cut before, though its mesh dimension comes first. A split
        # factor marks such a placement.
        if any(getattr(tensor.placements[i], "split_factor", 1) > 1 for i in cuts):
            cuts.reverse()
        start, stop = 0, size
        for i in cuts:
            chunk = -(-(stop - start) // mesh.size(i))  # as torch.chunk: the last chunks may be smaller or empty
            first = min(start + mesh.get_local_rank(i) * chunk, stop)
            start, stop = first, min(first + chunk, stop)
        ranges.append((start, stop))
    if [stop - start for start, stop in ranges] != list(local_part(tensor).shape):
        raise NotImplementedError(
            f"cannot tell which entries this rank holds of a tensor of shape {tuple(tensor.shape)} with placements "
            f"{tensor.placements}: use score: magnitude or saliency"
        )
    return ranges


def with_placements_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor distributed as another one of its shape is; partial sums are added up on the way."""
    if isinstance(tensor, DTensor) and isinstance(like, DTensor) and tensor.placements != like.placements:
        return tensor.redistribute(like.device_mesh, like.placements)
    return tensor


def has_partial_sums(tensor: Tensor) -> bool:
    """Whether the ranks hold terms of each entry rather than the entry."""
    return isinstance(tensor, DTensor) and any(isinstance(p, Partial) for p in tensor.placements)


def _is_shard(placement: Any) -> bool:
    # Not isinstance(Shard): in some releases FSDP2's strided shards are a class of their own
    return not isinstance(placement, (Replicate, Partial))
