"""One process of ``test_state.py``: saves a training state on several meshes, and restores each on all of them.

    torchrun --standalone --nproc_per_node 4 state_worker.py FOLDER [all]

Every mesh is a world of its own, of the first ranks; it restores what itself and two others saved, or with ``all`` what
each saved. A value says by itself where in its tensor it belongs.
"""

import functools
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchao.optim import AdamW4bit, AdamW8bit

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.integrations.torchtune.checkpoint import state
from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts
from gmt_tune.integrations.torchtune.process_group import leave
from gmt_tune.masking.packing import pack_selection, unpack_selection
from gmt_tune.masking.tracker import SelectionTracker
from gmt_tune.optim.states import to_floats

MESHES = [(1,), (2,), (3,), (4,), (2, 2)]
SHAPES = {
    "odd": (37, 3),  # ranks begin within a byte of the bits
    "flat": (11,),
    "few": (3, 5),  # fewer rows than ranks
    "blocks": (64, 256),
    "half_blocks": (192, 100),  # two ranks hold no whole number of quantized blocks, three do
    "large": (144, 300),  # compact states are quantized on any number of ranks
}
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "8bit": AdamW8bit,
    "4bit": AdamW4bit,
    "compact": CompactAdamW,
    "compact 8bit": functools.partial(CompactAdamW, state_bits=8),
}
# A 4-bit state has 16 values, and may have been quantized twice
TOLERANCES = {"adamw": 0.0, "8bit": 0.05, "4bit": 0.2, "compact": 0.0, "compact 8bit": 0.05}


def values(name: str, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name + kind)))
    return torch.rand(SHAPES[name], generator=generator) + 0.1


def bits(name: str, kind: str) -> torch.Tensor:
    return values(name, kind) > 0.6


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    local = local.dequantize() if type(local) is not torch.Tensor else local
    kwargs = dict(run_check=False, shape=tensor.shape, stride=tensor.stride())
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, **kwargs).full_tensor()


class Training:
    """A model with its optimizer and mask, on one mesh."""

    def __init__(self, mesh_shape: tuple[int, ...], optimizer: str) -> None:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "tensor")[: len(mesh_shape)])
        self.model = nn.Module()
        for name, shape in SHAPES.items():
            placements = [Shard(min(i, len(shape) - 1)) for i in range(mesh.ndim)]
            self.model.register_parameter(name, nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements)))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.is_compact = isinstance(self.optimizer, CompactAdamW)
        dense = ["few", "half_blocks"] if self.is_compact else []
        self.mask = GradientMask(self.model.named_parameters(), 0.2, refresh_every=None, dense=dense)
        if self.is_compact:
            self.mask.register(self.optimizer)
        self.tracker = SelectionTracker(self.mask)
        device = torch.device("cpu")
        self.parts = TrainingParts(self.model, [self.optimizer], None, self.mask, self.tracker, device, None)

    def own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        p = self.model.get_parameter(name)
        return distribute_tensor(tensor, p.device_mesh, p.placements).to_local()

    def fill(self) -> None:
        masked = self.mask.masked_parameters
        packed = [{name: pack_selection(self.own(name, bits(name, kind))) for name in masked} for kind in "abc"]
        self.mask.load_state_dict(
            {"policy": self.mask.policy(), "steps": dict.fromkeys(masked, 7), "selections": packed[0]}
        )
        self.tracker.load_state_dict({"calls": dict.fromkeys(masked, 7), "last": packed[1], "ever": packed[2]})
        for name, p in self.model.named_parameters():
            if self.is_compact and name in masked:
                for key in ("exp_avg", "exp_avg_sq", "age"):
                    selected = self.own(name, values(name, key))[self.own(name, bits(name, "a"))]
                    selected = (selected * 1000).short() if key == "age" else selected
                    self.optimizer.load_compact_state(p, key, selected, selected.numel())
                continue
            made = self.optimizer.state[p] = {"step": torch.tensor(7.0)}
            for key in ("exp_avg", "exp_avg_sq"):
                made[key] = torch.zeros_like(p)
                if hasattr(self.optimizer, "_new_buffer"):
                    made[key] = self.optimizer._new_buffer(p, key == "exp_avg")
                made[key].to_local().copy_(self.own(name, values(name, key)))

    def check(self, tolerance: float) -> None:
        assert self.mask.step == 7
        held = self.mask.state_dict()["selections"], *(self.tracker.state_dict()[key] for key in ("last", "ever"))
        for name in self.mask.masked_parameters:
            for packed, kind in zip(held, "abc", strict=True):
                wanted = self.own(name, bits(name, kind)).reshape(-1)
                assert torch.equal(unpack_selection(packed[name], wanted.numel()), wanted), (name, kind)
        for name, p in self.model.named_parameters():
            found = self.optimizer.state[p]
            if self.is_compact and name in self.mask.masked_parameters:
                for key in ("exp_avg", "exp_avg_sq", "age"):
                    wanted = self.own(name, values(name, key))[self.own(name, bits(name, "a"))]
                    wanted = (wanted * 1000).short() if key == "age" else wanted
                    selected = to_floats(found[key])[: wanted.numel()]
                    torch.testing.assert_close(selected, wanted, rtol=0, atol=0 if key == "age" else tolerance)
                continue
            assert found["step"].item() == 7
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(whole(found[key]), values(name, key), rtol=0, atol=tolerance)

    def check_bits(self, other: "Training") -> None:
        """The compact states must be the other's, bit for bit."""
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        states = [(self.optimizer.state[p], other.optimizer.state[q]) for p, q in pairs]
        compact = [(own[key], its[key]) for own, its in states if "age" in own for key in own]
        assert len(compact) == 4 * 3
        for found, wanted in compact:
            assert type(found) is type(wanted) and found.dtype == wanted.dtype and found.shape == wanted.shape
            assert torch.equal(to_floats(found), to_floats(wanted))


def restores(mesh_shape: tuple[int, ...], saved: tuple[int, ...]) -> bool:
    """Whether the quick test has this pair: from fewer ranks and from more, to fewer and to more."""
    return (MESHES.index(saved) - MESHES.index(mesh_shape)) % len(MESHES) in (0, 1, 3)


def main(folder: Path, restores_all: bool) -> None:
    rank = int(os.environ["RANK"])
    for turn in ("save", "restore"):
        for mesh_shape in MESHES:
            size = math.prod(mesh_shape)
            if rank >= size:
                continue
            store = dist.FileStore(f"{folder}/{turn}{mesh_shape}", size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
            for optimizer in OPTIMIZERS:
                if turn == "save":
                    training = Training(mesh_shape, optimizer)
                    training.fill()
                    writer = state.plan_save(folder / f"{mesh_shape}{optimizer}", training.parts, copy=False)
                    written: list = [None] * size
                    dist.all_gather_object(written, writer.write())
                    if rank == 0:
                        writer.finish(written)
                    continue
                for saved in MESHES:
                    if not (restores_all or restores(mesh_shape, saved)):
                        continue
                    training = Training(mesh_shape, optimizer)
                    is_same = saved == mesh_shape
                    rng = state.restore(folder / f"{saved}{optimizer}", training.parts, is_same_world=is_same)
                    assert (rng is not None) == is_same
                    training.check(TOLERANCES[optimizer])
                    if is_same and training.is_compact:
                        filled = Training(mesh_shape, optimizer)
                        filled.fill()
                        training.check_bits(filled)
            dist.barrier()
            leave()  # without which the process can abort
        while turn == "save" and len(list(folder.glob("*/.metadata"))) < len(MESHES) * len(OPTIMIZERS):
            time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "all" in sys.argv[2:])
