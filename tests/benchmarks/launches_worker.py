"""Counts the operations of a mask's step whose kernels run in Triton's interpreter: see test_paper_estimate.py."""

import collections
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import triton.runtime.interpreter
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gmt_tune import GradientMask
from gmt_tune.masking.search import devices

# Of the same memory, or only reserving some
FREE = {"view", "slice", "select", "unbind", "split_with_sizes", "split", "expand", "unsqueeze", "squeeze", "detach"}
FREE |= {"alias", "transpose", "permute", "empty", "empty_like", "new_empty", "lift_fresh", "_unsafe_view", "t"}
DENSE = 3


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def count(masked: int, mesh) -> dict:
    """Of the second step: some constants are made in the first."""
    shapes = {f"w{i}": (64, 32) for i in range(masked)} | {f"norm{i}": (64,) for i in range(DENSE)}

    def make(shape):
        whole = torch.randn(shape, dtype=torch.bfloat16)
        return whole if mesh is None else distribute_tensor(whole, mesh, [Shard(0)])

    parameters = {name: torch.nn.Parameter(make(shape)) for name, shape in shapes.items()}
    mask = GradientMask(parameters.items(), 0.2, dense=["norm*"])
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    mask.register(optimizer)
    for _ in range(2):
        for name, p in parameters.items():
            p.grad = make(shapes[name])
        with Operations() as operations:
            mask._before_step(optimizer, (optimizer,), {})
    names = {name: n for name, n in operations.names.items() if name not in FREE}
    return {
        "masked": masked,
        "dense": DENSE,
        "ranks": 1 if mesh is None else dist.get_world_size(),
        "operations": sum(names.values()),
        "all_reduces": names.get("allreduce_", 0),
        "names": names,
    }


def main(file: str) -> None:
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    devices._SERVED = ("cpu",)
    launch = triton.runtime.interpreter.GridExecutor.__call__

    def launch_uncounted(self, *arguments, **options):
        torch.empty(0).zero_()  # is counted in its place
        with _disable_current_modes():
            return launch(self, *arguments, **options)

    triton.runtime.interpreter.GridExecutor.__call__ = launch_uncounted
    rows = [count(masked, layout) for layout in (None, mesh) for masked in (5, 10)]
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
