"""What a run needs besides its weights to go on exactly: optimizer, schedule, random numbers, mask.

Every rank keeps its own part in a file of its own, with its tensors as they are: nothing is gathered, and
quantized optimizer states keep their bits. On another number of ranks, the parts are put together and cut
anew; torchao's quantized states are then quantized again, all others keep their values.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.optim import Optimizer

from gmt_tune.errors import UserError
from gmt_tune.masking import GradientMask
from gmt_tune.masking.names import bare_name
from gmt_tune.masking.packing import pack_selection, unpack_selection
from gmt_tune.masking.tracker import SelectionTracker

_HYPERPARAMETERS = "hyperparameters"


def state_file(rank: int) -> str:
    """Name of one rank's file in a checkpoint folder."""
    return f"training_state_rank{rank}.pt"


def collect(
    model: nn.Module,
    optimizers: list[Optimizer],
    lr_scheduler,
    mask: GradientMask | None,
    device: torch.device,
    *,
    tracker: SelectionTracker | None = None,
    copy: bool = False,
) -> dict:
    """This rank's part of the training state, on the CPU, ready for ``torch.save``.

    Args:
        tracker: of overlap and coverage, if there is one.
        copy: make it one that further training does not change, also where the optimizer's tensors are on the CPU.
    """
    names: dict = {p: name for name, p in _named_parameters(model)}
    return {
        "optimizer": {
            names[p]: {key: _to_cpu(value, copy) for key, value in state.items()}
            for optimizer in optimizers
            for p, state in optimizer.state.items()
        },
        _HYPERPARAMETERS: [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for optimizer in optimizers
            for group in optimizer.param_groups
        ],
        # With optimizer in backward, the scheduler's own step() is among its attributes
        "lr_scheduler": lr_scheduler
        and {key: value for key, value in lr_scheduler.state_dict().items() if not callable(value)},
        "mask": mask.state_dict() if mask is not None else None,
        "tracker": tracker.state_dict(copy=copy) if tracker is not None else None,
        "rng": _rng_state(device),
        "local_numel": {name: _local(p).numel() for name, p in _named_parameters(model)},
    }


def restore(
    folder: Path,
    saved_world_size: int,
    rank: int,
    world_size: int,
    model: nn.Module,
    optimizers: list[Optimizer],
    lr_scheduler,
    mask: GradientMask | None,
    device: torch.device,
    *,
    tracker: SelectionTracker | None = None,
) -> dict | None:
    """Put a state that :func:`collect` gave back where it came from.

    Args:
        folder: of the checkpoint.
        saved_world_size: how many ranks wrote it.

    Returns:
        The state of the random number generators, for :func:`set_rng_state` right before the next batch (making
        a data loader's iterator draws a number); None where it was saved by another number of ranks.

    Raises:
        UserError: if it was saved by another kind of optimizer, or sharded in a way that cannot be cut anew.
    """
    parameters = dict(_named_parameters(model))
    if saved_world_size == world_size:
        state = _read(folder, rank)
    else:
        state = _reshard(_read_all(folder, saved_world_size), parameters)
    owners = {p: (optimizer, g) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    for name, saved in state["optimizer"].items():
        p = parameters[name]
        optimizer, group = owners[p]
        counts_on_device = bool(group.get("fused") or group.get("capturable"))
        optimizer.state[p] = {key: _from_cpu(value, p, counts_on_device) for key, value in saved.items()}
        if saved_world_size != world_size:
            _quantize_again(optimizer, p)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if len(groups) != len(state[_HYPERPARAMETERS]):
        raise UserError(f"the checkpoint {folder} was saved with another setting of optimizer_in_bwd: set it as it was")
    for group, saved in zip(groups, state[_HYPERPARAMETERS], strict=True):
        for key, value in saved.items():
            # torchao's optimizers hold the learning rate as a tensor that compiled code refers to
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
    if lr_scheduler is not None and state["lr_scheduler"] is not None:
        lr_scheduler.load_state_dict(state["lr_scheduler"])
    if mask is not None and state["mask"] is not None:
        try:
            mask.load_state_dict(state["mask"])
        except ValueError as error:
            raise UserError(f"cannot go on from {folder}: {error}") from None
    if tracker is not None and state.get("tracker") is not None:
        tracker.load_state_dict(state["tracker"])
    return state["rng"]


def _read(folder: Path, rank: int, *, mmap: bool = False) -> dict:
    state = torch.load(folder / state_file(rank), map_location="cpu", weights_only=True, mmap=mmap)
    for key in ("optimizer", "local_numel"):
        state[key] = {bare_name(name): value for name, value in state[key].items()}
    return state


def _read_all(folder: Path, saved_world_size: int) -> list[dict]:
    """The parts of all ranks, mapped into memory: of their tensors, only what is used will be read."""
    return [_read(folder, rank, mmap=True) for rank in range(saved_world_size)]


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By names that do not depend on whether activations are checkpointed, which may change when a run goes on."""
    return ((bare_name(name), p) for name, p in model.named_parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain(value):
    return value.item() if isinstance(value, Tensor) else value


def _clone(tensor):
    """A copy in memory of its own, also of torchao's quantized states, which have no ``clone``."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name).clone() for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, None, None)


def _to_cpu(value, copy: bool):
    """One entry of an optimizer's state as (tensor, was it sharded, was it on an accelerator), or the plain value."""
    if not isinstance(value, Tensor):
        return value
    local = _local(value).detach()
    on_cpu = local.cpu() if not local.is_cpu else _clone(local) if copy else local
    return (on_cpu, isinstance(value, DTensor), not local.is_cpu)


def _from_cpu(value, p: Tensor, counts_on_device: bool):
    """What :func:`_to_cpu` made, where the optimizer of ``p`` looks for it.

    That is beside ``p``, which fsdp_cpu_offload keeps on the CPU. A count of steps (0-d) is on the CPU unless it was
    not, or the optimizer is fused or capturable.
    """
    if not isinstance(value, tuple):
        return value
    local, is_sharded, was_on_accelerator = value
    if local.dim() > 0 or was_on_accelerator or counts_on_device:
        local = local.to(_local(p).device)
    if not (is_sharded and isinstance(p, DTensor)):
        return local
    # DTensor.from_local would move it to the mesh's device
    meta = TensorMeta(p.shape, p.stride(), local.dtype)
    return DTensor(local, DTensorSpec(p.device_mesh, p.placements, tensor_meta=meta), requires_grad=False)


def _quantize_again(optimizer: Optimizer, p: Tensor) -> None:
    """Turn the float states of a torchao optimizer, which resharding leaves, into its own kind of tensors."""
    if not hasattr(optimizer, "_new_buffer"):
        return
    for key, value in optimizer.state[p].items():
        if isinstance(value, Tensor) and value.dim() > 0:
            buffer = optimizer._new_buffer(p, key == "exp_avg")
            _local(buffer).copy_(_local(value))
            optimizer.state[p][key] = buffer


def _reshard(parts: list[dict], parameters: Mapping[str, Tensor]) -> dict:
    """The parts of all ranks of another world size as one part for this rank."""
    optimizer: dict = {}
    for name, first in parts[0]["optimizer"].items():
        start, stop = _local_rows(name, parameters[name])
        optimizer[name] = {}
        for key, value in first.items():
            if not isinstance(value, tuple) or value[0].dim() == 0:
                optimizer[name][key] = value  # step counts are the same on all ranks
                continue
            saved = [part["optimizer"][name][key][0] for part in parts]
            own = _own_rows(saved if value[1] else saved[:1], start, stop)
            optimizer[name][key] = (own, isinstance(parameters[name], DTensor), value[2])
    state = {**parts[0], "optimizer": optimizer, "rng": None}
    for owner, keys in (("mask", ("selections",)), ("tracker", ("last", "ever"))):
        if state.get(owner) is not None:
            anew = {key: _reshard_bits(parts, owner, key, parameters) for key in keys}
            state[owner] = {**state[owner], **anew}
            state[owner].pop("shards", None)  # of the rank that saved it
    return state


def _reshard_bits(parts: list[dict], owner: str, key: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bits by parameter name, packed by each rank of another world size, for this rank's entries."""
    own = {}
    for name in parts[0][owner][key]:
        p = parameters[name]
        start, stop = _local_rows(name, p)
        row = p.numel() // p.shape[0] if p.dim() else 1
        saved = [(part[owner][key][name], part["local_numel"][name]) for part in parts]
        if sum(numel for _, numel in saved) != p.numel():  # not sharded: every rank has saved them all
            saved = saved[:1]
        own[name] = pack_selection(_own_bits(saved, start * row, stop * row))
    return own


def _own_rows(parts: list[Tensor], start: int, stop: int) -> Tensor:
    """Rows of the tensor that ``parts`` make one below the other, in memory of its own; quantized ones as floats."""
    rows = []
    for i, first, last in _overlaps([part.shape[0] for part in parts], start, stop):
        is_quantized = hasattr(parts[i], "dequantize") and type(parts[i]) is not Tensor
        rows.append((parts[i].dequantize() if is_quantized else parts[i])[first:last])
    return torch.cat(rows) if rows else torch.empty(0, *parts[0].shape[1:], dtype=parts[0].dtype)


def _own_bits(parts: list[tuple[Tensor, int]], start: int, stop: int) -> Tensor:
    """Entries of the bits that parts (packed, number of entries) make one after the other: a bool tensor, flat."""
    bits = [torch.empty(0, dtype=torch.bool)]
    for i, first, last in _overlaps([numel for _, numel in parts], start, stop):
        byte = first // 8
        bits.append(unpack_selection(parts[i][0][byte : -(-last // 8)], last - 8 * byte)[first - 8 * byte :])
    return torch.cat(bits)


def _overlaps(lengths: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Of parts laid end to end, those that reach into a range: (index, first and last + 1 within the part)."""
    offset = 0
    for i, length in enumerate(lengths):
        first, last = max(start - offset, 0), min(stop - offset, length)
        if first < last:
            yield i, first, last
        offset += length


def _local_rows(name: str, p: Tensor) -> tuple[int, int]:
    """Range of rows of the whole tensor that this rank holds."""
    if not isinstance(p, DTensor):
        return 0, p.shape[0] if p.dim() else 1
    sharded = [(i, placement) for i, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or any(placement != Shard(0) for _, placement in sharded):
        raise UserError(
            f"'{name}' is sharded over several dimensions: resume on the number of ranks that saved the checkpoint"
        )
    if not sharded:
        return 0, p.shape[0]
    mesh_dim = sharded[0][0]
    size, index = p.device_mesh.size(mesh_dim), p.device_mesh.get_local_rank(mesh_dim)
    chunk = -(-p.shape[0] // size)  # FSDP2 cuts like torch.chunk
    return min(index * chunk, p.shape[0]), min((index + 1) * chunk, p.shape[0])


def _rng_state(device: torch.device) -> dict:
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    """Continue the random numbers of Python, NumPy and torch from a state that was saved."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
