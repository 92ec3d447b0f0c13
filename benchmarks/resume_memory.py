"""The host memory that a resume on another number of ranks takes, against the training state that a rank then holds.

A model of linear layers is sharded by FSDP2 over some ranks (gloo, on the CPU), takes a step with a kept selection, and
is saved; other ranks restore the state. A rank's peak is that of its own resident pages above what it held before.

    python benchmarks/resume_memory.py benchmarks/results/resume_memory.jsonl
"""

import argparse
import importlib
import json
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

OPTIMIZERS = {
    "AdamW": "torch.optim",
    "AdamW8bit": "torchao.optim",
    "AdamW4bit": "torchao.optim",
    "CompactAdamW": "gmt_tune",
}


def measure(saved_by: int, resumed_by: int, optimizer: str, *, layers: int = 16, width: int = 1024) -> dict:
    """One resume.

    Returns:
        Its arguments, and of the rank whose ratio is the highest: ``state_mb``, ``peak_mb``, ``ratio``.
    """
    with tempfile.TemporaryDirectory() as folder:
        for size in (saved_by, resumed_by):
            mp.spawn(_run, (size, size == saved_by, folder, optimizer, layers, width), nprocs=size)
        found = [json.loads(file.read_text()) for file in Path(folder).glob("rank*.json")]
    worst = max(found, key=lambda of_rank: of_rank["ratio"])
    sizes = {"layers": layers, "width": width}
    return {"optimizer": optimizer, "saved_by": saved_by, "resumed_by": resumed_by, **sizes, **worst}


def _run(rank: int, size: int, saves: bool, folder: str, optimizer: str, layers: int, width: int) -> None:
    from gmt_tune import GradientMask
    from gmt_tune.integrations.torchtune.checkpoint import state
    from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts

    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store{size}", size), rank=rank, world_size=size)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    made = getattr(importlib.import_module(OPTIMIZERS[optimizer]), optimizer)(model.parameters())
    mask = GradientMask(model.named_parameters(), 0.2, refresh_every=None, dense=())
    parts = TrainingParts(model, [made], None, mask, None, torch.device("cpu"), None)
    if saves:
        mask.register(made)
        model(torch.randn(2, width)).square().sum().backward()
        made.step()
        writer = state.plan_save(Path(folder) / "state", parts, copy=False)
        written: list = [None] * size
        dist.all_gather_object(written, writer.write())
        if rank == 0:
            writer.finish(written)
        dist.barrier()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = _memory("RssAnon")
        state.restore(Path(folder) / "state", parts, is_same_world=False)
        # Pages of libraries come into memory as their code first runs: they are no data
        peak = _memory("VmHWM") - _memory("RssFile") - _memory("RssShmem") - before
        held = sum(_bytes(v) for s in made.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        held += sum(bits.nbytes for bits in mask.state_dict()["selections"].values())
        numbers = {"state_mb": round(held / 1e6, 1), "peak_mb": round(peak / 1e6, 1), "ratio": round(peak / held, 3)}
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(numbers))
    dist.destroy_process_group()


def _memory(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if hasattr(local, "__tensor_flatten__"):
        return sum(getattr(local, name).nbytes for name in local.__tensor_flatten__()[0])
    return local.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file of JSON lines")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    rows = []
    for optimizer in OPTIMIZERS:
        for saved_by, resumed_by in ((4, 2), (2, 4)):
            rows.append(measure(saved_by, resumed_by, optimizer, layers=arguments.layers, width=arguments.width))
            print(rows[-1], flush=True)
    arguments.results.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
