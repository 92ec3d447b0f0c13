"""What a run needs besides its weights to go on exactly: optimizer, schedule, random numbers, mask.

Tensors are saved as each rank holds them, and nothing is gathered; ``shards`` cuts them where the ranks hold other
parts now. torchao's quantized states keep their bits where their blocks can be cut so, and are quantized again where
they cannot. States of selected entries alone are saved beside the selection's bits, which say whose they are.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, zeros
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts
from gmt_tune.integrations.torchtune.checkpoint.shards import (
    CompactValues,
    PackedBits,
    ShardReader,
    ShardWriter,
    Value,
)
from gmt_tune.masking.names import bare_name
from gmt_tune.masking.optimizers import CompactOptimizer

FOLDER = "training_state"  # in a checkpoint's

_BITS = {"mask": ("selections",), "tracker": ("last", "ever")}  # by name of a parameter, packed, in their state_dict


def plan_save(folder: Path, parts: TrainingParts, *, copy: bool) -> ShardWriter:
    """Plan with all ranks what each will write of the training state.

    Args:
        folder: for the files.
        copy: of the state as it is now, so that training may go on before it is written.
    """
    values: dict[str, Value] = {}
    rank, common = dist.get_rank(), _common(parts)
    names: dict = {p: name for name, p in _named_parameters(parts.model)}
    for optimizer in parts.optimizers:
        for p, state in optimizer.state.items():
            is_compact = _is_compact(optimizer, p, parts)
            for key, value in state.items():
                if is_compact:
                    values[f"compact.{names[p]}.{key}"] = CompactValues(value.detach(), p.detach())
                elif isinstance(value, Tensor) and value.dim() > 0:
                    is_own = isinstance(p, DTensor) and not isinstance(value, DTensor)
                    values[f"{_of_rank(rank) if is_own else ''}optimizer.{names[p]}.{key}"] = value.detach()
                else:
                    was_on_accelerator = isinstance(value, Tensor) and not value.is_cpu
                    common["scalars"].setdefault(names[p], {})[key] = (_on_cpu(value), was_on_accelerator)
    parameters = dict(_named_parameters(parts.model))
    for owner, keys in _BITS.items():
        state = common[owner] or {}
        state.pop("shards", None)  # where the bits lie, which the files say as well
        for key in keys:
            for name, packed in state.pop(key, {}).items():
                values[f"{owner}.{key}.{name}"] = PackedBits(packed, parameters[name].detach())
    if rank == 0:
        values["common"] = _as_tensor(common)
    values[f"{_of_rank(rank)}rng"] = _as_tensor(_rng_state(parts.device))
    return ShardWriter(folder, values, copy=copy)


@torch.no_grad()
def restore(folder: Path, parts: TrainingParts, *, is_same_world: bool) -> dict | None:
    """Put a saved state back where it came from.

    Args:
        folder: of the state's files.
        is_same_world: as many ranks saved it.

    Returns:
        The state of the random number generators, for :func:`set_rng_state` right before the next batch (making
        a data loader's iterator draws a number); None where it was saved by another number of ranks.

    Raises:
        UserError: if it was saved by another kind of optimizer, or with another mask.
    """
    reader = ShardReader(folder)
    common = _from_tensor(reader.read_whole("common"))
    kind = _kind(parts)
    if common.get("optimizer", kind) != kind:  # earlier versions did not say
        raise UserError(
            f"the checkpoint {folder.parent} was saved with optimizer {common['optimizer']}, and this run has {kind}, "
            "whose states are others: set optimizer._component_ as it was, or start a new run from its weights"
        )
    parameters = dict(_named_parameters(parts.model))
    groups = [group for optimizer in parts.optimizers for group in optimizer.param_groups]
    if len(groups) != len(common["hyperparameters"]):
        raise UserError(
            f"the checkpoint {folder.parent} was saved with another setting of optimizer_in_bwd: set it as it was"
        )
    for owner, keys in _BITS.items():
        held = getattr(parts, owner)
        if held is None or common[owner] is None:
            continue
        bits: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
        for name in (name for name in reader.tensors if name.startswith(f"{owner}.")):
            _, key, of = name.split(".", 2)
            bits[key][of] = reader.read_bits(name, parameters[of])
        try:
            held.load_state_dict(common[owner] | bits)
        except ValueError as error:
            raise UserError(f"cannot go on from {folder.parent}: {error}") from None
    own = _of_rank(dist.get_rank() if is_same_world else 0)
    _restore_states(reader, own, common["scalars"], parameters, parts)
    for group, saved in zip(groups, common["hyperparameters"], strict=True):
        for key, value in saved.items():
            # torchao's optimizers hold the learning rate as a tensor that compiled code refers to
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
    if parts.lr_scheduler is not None and common["lr_scheduler"] is not None:
        parts.lr_scheduler.load_state_dict(common["lr_scheduler"])
    return _from_tensor(reader.read_whole(f"{own}rng")) if is_same_world else None


def _restore_states(
    reader: ShardReader, own: str, scalars: dict, parameters: dict[str, Tensor], parts: TrainingParts
) -> None:
    owners: dict[Any, tuple[Any, dict]] = {
        p: (o, group) for o in parts.optimizers for group in o.param_groups for p in group["params"]
    }
    mask: Any = parts.mask
    for name, values in scalars.items():
        p = parameters[name]
        optimizer, group = owners[p]
        optimizer.state[p] = {key: _count(value, was, group, p) for key, (value, was) in values.items()}
    targets = []
    for saved in reader.tensors:  # all are made before the first is filled, so that reading leaves no holes behind
        part, _, key = saved.rpartition(".")
        if saved.startswith("optimizer."):
            p = parameters[part.removeprefix("optimizer.")]
            optimizer = owners[p][0]
            targets.append((saved, p, _empty_state(reader, saved, optimizer, p, key)))
            optimizer.state[p][key] = targets[-1][2]
        elif saved.startswith(f"{own}optimizer."):
            p = parameters[part.removeprefix(f"{own}optimizer.")]
            owners[p][0].state[p][key] = _beside(reader.read_whole(saved), p)
        elif saved.startswith("compact."):
            name = part.removeprefix("compact.")
            p = parameters[name]
            values = reader.read_compact(saved, f"mask.selections.{name}", p)
            owners[p][0].load_compact_state(p, key, values, mask.selection(p).places.count)
    for saved, p, target in targets:
        try:
            reader.read_(saved, target)
        except (ValueError, NotImplementedError):  # torchao's blocks do not begin where this rank's rows do
            _local(target).copy_(_beside(reader.read_floats(saved, p), p))


def _common(parts: TrainingParts) -> dict[str, Any]:
    """What is the same on all ranks; of the mask and its tracker, the bits as well."""
    scheduler = parts.lr_scheduler
    return {
        "mask": parts.mask.state_dict() if parts.mask is not None else None,
        "tracker": parts.tracker.state_dict() if parts.tracker is not None else None,
        "optimizer": _kind(parts),
        "scalars": {},
        "hyperparameters": [
            {key: _plain(value) for key, value in group.items() if key != "params"}
            for optimizer in parts.optimizers
            for group in optimizer.param_groups
        ],
        # With optimizer in backward, the scheduler's own step() is among its attributes
        "lr_scheduler": scheduler
        and {key: value for key, value in scheduler.state_dict().items() if not callable(value)},
    }


def _kind(parts: TrainingParts) -> str:
    return type(parts.optimizers[0]).__name__


def _is_compact(optimizer: Optimizer, p: Tensor, parts: TrainingParts) -> bool:
    """Whether an optimizer's states of a parameter are those of its selected entries alone."""
    return isinstance(optimizer, CompactOptimizer) and parts.mask is not None and parts.mask.selection(p) is not None


def _count(value, was_on_accelerator: bool, group: dict, p: Tensor):
    """A count of steps (0-d) or a plain value: on the CPU unless it was not, or the optimizer wants it beside ``p``."""
    if isinstance(value, Tensor) and (was_on_accelerator or group.get("fused") or group.get("capturable")):
        return _beside(value, p)
    return value


def _empty_state(reader: ShardReader, name: str, optimizer: Optimizer, p: Tensor, key: str) -> Tensor:
    if hasattr(optimizer, "_new_buffer"):  # torchao's own kind, or plain where this rank's part is small
        return optimizer._new_buffer(p, key == "exp_avg")
    return _empty(p, reader.tensors[name].size, reader.tensors[name].properties.dtype)


def _empty(p: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """For a state of a parameter: sharded as that, or whole on each rank if it has another size (a mean over rows)."""
    if size == p.shape:
        return torch.empty_like(p, dtype=dtype, requires_grad=False)
    if isinstance(p, DTensor):
        mesh = p.device_mesh
        return zeros(size, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    return torch.empty(size, dtype=dtype, device=p.device)


def _of_rank(rank: int) -> str:
    return f"rank{rank}."


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By names that do not depend on whether activations are checkpointed, which may change when a run goes on."""
    return ((bare_name(name), p) for name, p in model.named_parameters())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _beside(value: Tensor, p: Tensor) -> Tensor:
    """On the device of this rank's part of a parameter, which fsdp_cpu_offload keeps on the CPU."""
    return value.to(_local(p).device)


def _on_cpu(value):
    return _local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _plain(value):
    return value.item() if isinstance(value, Tensor) else value


def _as_tensor(value) -> Tensor:
    """Plain values and tensors as bytes, which DCP saves without pickling them in a way that runs code.

    Numbers of NumPy, such as the rate of a schedule that takes ``np.cos``, as Python's: those it could not load.
    """
    stream = io.BytesIO()
    torch.save(tree_map_only(np.generic, lambda number: number.item(), value), stream)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8).clone()


def _from_tensor(saved: Tensor):
    return torch.load(io.BytesIO(saved.numpy().tobytes()), map_location="cpu", weights_only=True)


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
