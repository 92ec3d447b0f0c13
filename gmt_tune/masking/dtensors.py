"""How a DTensor lies over the ranks: the part of it that this rank holds, and who shares the rest.

Knows any mesh: FSDP2's and tensor parallelism's shards, replicas, uneven and empty shards. Importing this imports
``torch.distributed.tensor``; ``parts`` does so where there is a DTensor.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def local_part(tensor: Any) -> Tensor:
    """The entries of a tensor that this rank holds, sharing its memory; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    local = detached.to_local()
    # What a collective is still filling says so by a subclass of Tensor that can be waited for
    return local.wait() if hasattr(local, "trigger_wait") else local


def shares(grads: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, tuple[dist.ProcessGroup, ...], bool]]:
    """What a :class:`gmt_tune.masking.parts.Part` says of each: ``grad``, ``local``, ``groups`` and ``is_counted``.

    Those on one mesh get the same groups, so that they can share collectives.
    """
    # Replicas on every tensor's behalf need no sum: with HSDP, only the dimension that shards is reduced over
    dims: dict[DeviceMesh, set[int]] = {}
    for grad in grads:
        if isinstance(grad, DTensor):
            dims.setdefault(grad.device_mesh, set()).update(sharding_dims(grad))
    groups = {mesh: _groups(mesh, sorted(used)) for mesh, used in dims.items()}
    found: list = []
    for grad in grads:
        if not isinstance(grad, DTensor):
            found.append((grad, grad.detach(), (), True))
            continue
        mesh = grad.device_mesh
        replicated = dims[mesh] - set(sharding_dims(grad))
        is_counted = all(mesh.get_local_rank(dim) == 0 for dim in replicated)
        found.append((grad, local_part(grad), groups[mesh], is_counted))
    return found


def distribute_as_parameter_(p: Tensor) -> None:
    """Let each rank hold of a gradient the entries that it holds of the parameter.

    Tensor parallelism leaves gradients otherwise: as sums over ranks that are still to be made, or whole on each rank
    where the parameter is sharded. An optimizer would do the same on first use.
    """
    if isinstance(p.grad, DTensor):
        p.grad = with_placements_of(p.grad, p)


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


def local_ranges(tensor: DTensor) -> list[tuple[int, int]]:
    """:func:`gmt_tune.masking.parts.index_ranges` of a DTensor."""
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
            f"which entries this rank holds is not known of a tensor of shape {tuple(tensor.shape)} with placements "
            f"{tensor.placements}: use score: magnitude or saliency"
        )
    return ranges


def with_placements_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor distributed as another one of its shape is; partial sums are added up on the way."""
    if isinstance(tensor, DTensor) and isinstance(like, DTensor) and tensor.placements != like.placements:
        return tensor.redistribute(like.device_mesh, like.placements)
    return tensor


def _is_shard(placement: Any) -> bool:
    # Not isinstance(Shard): in some releases FSDP2's strided shards are a class of their own
    return not isinstance(placement, (Replicate, Partial))
