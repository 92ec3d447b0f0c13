"""The part of each parameter that one device holds, as torchtune's distributed recipe splits a model.

The device with the largest share counts: FSDP2 cuts dimension 0 into pieces of ``ceil(size / devices)``, so the first
device never holds less than another.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel


@dataclass(frozen=True)
class Mesh:
    """Devices as a grid: ``data`` shards by FSDP2, ``tensor`` shards by tensor parallelism. 1 is no sharding."""

    data: int = 1
    tensor: int = 1


def local_shapes(model: nn.Module, mesh: Mesh, tensor_parallel_plan: dict | None = None) -> dict[str, torch.Size]:
    """Shapes of the parameters, on the meta device or another, as one device of the mesh holds them.

    ``tensor_parallel_plan`` maps module name patterns to torch's parallel styles, as ``parallelize_module`` takes it;
    parameters outside the plan are whole on every tensor parallel device.
    """
    shapes = {}
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        dim = _tensor_parallel_dim(name, model, tensor_parallel_plan or {}) if mesh.tensor > 1 else None
        if dim is not None and dim < len(shape):
            shape[dim] = math.ceil(shape[dim] / mesh.tensor)
        if mesh.data > 1 and shape:
            shape[0] = math.ceil(shape[0] / mesh.data)
        shapes[name] = torch.Size(shape)
    return shapes


def _tensor_parallel_dim(name: str, model: nn.Module, plan: dict) -> int | None:
    """The dimension of a parameter that tensor parallelism cuts, or None."""
    module_name, _, kind = name.rpartition(".")
    style = next((style for pattern, style in plan.items() if fnmatchcase(module_name, pattern)), None)
    # torch's styles for linear layers: weight is [out, in], bias is [out]. An embedding's weight is
    # [entries, width], which its styles cut the other way round.
    is_embedding = isinstance(model.get_submodule(module_name), nn.Embedding)
    if isinstance(style, ColwiseParallel):
        return 1 if is_embedding else 0
    if isinstance(style, RowwiseParallel):
        if is_embedding:
            return 0
        return 1 if kind == "weight" else None
    return None


def gathered_units(separately: tuple[str, ...], gathered: dict[str, torch.Size]) -> dict[str, int]:
    """Entries of each module that FSDP2 gathers as one, and, under "", of what belongs to none.

    The latter are gathered during the whole of forward, and of backward. Modules are the model's ``layers`` and those
    that ``separately`` names (``custom_sharded_layers``). ``gathered`` are the shapes without data parallelism.
    """
    units: dict[str, int] = {}
    for name, shape in gathered.items():
        parts = name.split(".")
        owner = next((s for s in separately if name == s or name.startswith(s + ".")), None)
        if owner is None and "layers" in parts[:-1] and parts[parts.index("layers") + 1].isdigit():
            owner = ".".join(parts[: parts.index("layers") + 2])
        units[owner or ""] = units.get(owner or "", 0) + shape.numel()
    return units
