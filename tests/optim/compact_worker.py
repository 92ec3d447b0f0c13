"""One process of ``test_compact_sharded.py``; also gives the same cases to one process without any sharding.

    torchrun --standalone --nproc_per_node N compact_worker.py OUTPUT_FILE

Every process makes the same whole weights and gradients from seeds, and keeps its part of them.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.integrations.torchtune.process_group import leave
from gmt_tune.masking.parts import own_entries

SHAPES = {
    "layers.0.w": (24, 20),
    "layers.0.odd": (7, 5),
    "layers.1.w": (24, 20),
    "layers.1.cube": (3, 4, 5),
    "head": (33, 16),
    "norm": (12,),
}
DENSE = ["norm"]
STEPS = 9
HOW = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}


def cases() -> dict[str, dict[str, Any]]:
    """Keywords of each case: of the mask and the optimizer, and dtype and accumulation."""
    found = {}
    for every, accumulation, dtype in itertools.product((1, 7, None), (1, 3), (torch.float32, torch.bfloat16)):
        name = f"refresh {every}, accumulation {accumulation}, {dtype}"
        found[name] = dict(refresh_every=every, accumulation=accumulation, dtype=dtype, density=0.1, max_norm=1.0)
    shared = dict(refresh_every=3, accumulation=2, dtype=torch.float32, max_norm=None)
    for score in ("saliency", "random"):
        found[score] = dict(shared, density=0.2, score=score)
    found["one entry"] = dict(shared, density=1e-6)
    found["all entries"] = dict(shared, density=1.0)
    return found


def whole(name: str, dtype: torch.dtype, number: int) -> Tensor:
    """A weight (number -1) or the gradient of a micro-batch; of gradients, some rows are zero and many entries tie."""
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + number + 1)
    tensor = torch.randn(SHAPES[name], generator=generator)
    if number >= 0:
        tensor[::6] = 0
        tensor[1::3] = (tensor[1::3] * 4).round() / 4
    return tensor.to(dtype)


class Model(nn.Module):
    """Its loss is linear in its weights: the gradients are what it is given."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            path, _, last = name.rpartition(".")
            module: nn.Module = self
            for part in filter(None, path.split(".")):
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(weight))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((p * gradients[name]).sum() for name, p in self.named_parameters())


def train(case: dict[str, Any], model: Model, shard: Callable[[str, Tensor], Tensor] = lambda name, t: t) -> dict:
    """Weights and selections, whole, after each step; and what the mask and the optimizer were."""
    keywords = {key: case[key] for key in ("density", "refresh_every", "score") if key in case}
    mask = GradientMask(model.named_parameters(), dense=DENSE, **keywords)
    optimizer = CompactAdamW(model.parameters(), max_grad_norm=case["max_norm"], **HOW)
    mask.register(optimizer)
    weights, selected, number = [], [], 0
    shared = 0  # bytes of memory that gradients of dense parameters keep besides their own
    for _ in range(STEPS):
        for _ in range(case["accumulation"]):
            gradients = {name: shard(name, whole(name, case["dtype"], number)) for name in SHAPES}
            loss = model(gradients)
            (loss.full_tensor() if isinstance(loss, DTensor) else loss).backward()
            number += 1
        dense = [own_entries(p.grad) for name, p in model.named_parameters() if name in DENSE]
        shared = max(shared, *(grad.untyped_storage().nbytes() - grad.nbytes for grad in dense))
        optimizer.step()
        optimizer.zero_grad()
        weights.append({name: _full(p.detach()).clone() for name, p in model.named_parameters()})
        selected.append({name: int(count) for name, count in mask.statistics.selected.items()})
    return {"weights": weights, "selected": selected, "shared": shared}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _results() -> dict:
    n = dist.get_world_size()
    line = init_device_mesh("cpu", (n,), mesh_dim_names=("line",))
    layouts: dict[str, tuple] = {"rows": (line, [Shard(0)]), "FSDP2": (line, None)}
    if n == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        layouts |= {
            "rows and columns": (square, [Shard(0), Shard(1)]),
            "replicas": (square, [Replicate(), Shard(0)]),
            "replicas by FSDP2": (square, None),
        }
    elif n == 2:
        layouts["columns"] = (line, [Shard(1)])
    found = {}
    for layout, (mesh, placements) in layouts.items():
        for key, case in cases().items():

            def shard(name: str, tensor: Tensor, mesh=mesh, placements=placements) -> Tensor:
                if placements is None:
                    return tensor
                fits = [p if not isinstance(p, Shard) or p.dim < tensor.dim() else Replicate() for p in placements]
                return distribute_tensor(tensor, mesh, fits)

            given = {name: shard(name, whole(name, case["dtype"], -1)) for name in SHAPES}
            model = Model(given)
            if placements is None:
                fully_shard(model, mesh=mesh)
            found[f"{key} | {layout}"] = train(case, model, shard)
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = _results()
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [step["layers.0.w"] for step in results["all entries | rows"]["weights"]])
    if dist.get_rank() == 0:
        same = all(torch.equal(a, b) for other in everywhere for a, b in zip(other, everywhere[0], strict=True))
        torch.save({"results": results, "all ranks found the same": same}, sys.argv[1])
    leave()  # without which the process can abort at its end
