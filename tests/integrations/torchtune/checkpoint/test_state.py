"""A state that several ranks saved, on another number of ranks: the same values, and only those that are needed."""

import importlib
import os
import pickle
import weakref
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import shards, space, state
from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts

WORKER = Path(__file__).with_name("state_worker.py")


@pytest.mark.parametrize("pairs", ["", pytest.param("all", marks=pytest.mark.slow)])
def test_on_any_mesh_each_rank_gets_its_own_values_and_bits_back(pairs, tmp_path):
    """Plain, 8-bit, 4-bit and compact states, selections and what the tracker has seen, from every mesh to others.

    Compact states that go back to the mesh they came from are bit for bit what they were.
    """
    launch.torchrun(WORKER, tmp_path, pairs, processes=4, log_dir=tmp_path / "logs")
    assert len(list(tmp_path.glob("*/.metadata"))) == 25  # of five meshes and five optimizers


@pytest.mark.parametrize(
    "kind", ["subclass_8bit.OptimState8bit", "subclass_4bit.OptimState4bit", "subclass_fp8.OptimStateFp8"]
)
def test_a_copy_of_a_quantized_state_does_not_change_with_it(kind):
    module, _, name = kind.partition(".")
    quantized = getattr(importlib.import_module(f"torchao.optim.{module}"), name).zeros((4096,))
    quantized.copy_(torch.randn(4096))
    wanted = quantized.dequantize()
    saved = shards._copy(quantized)
    quantized.copy_(torch.zeros(4096))
    assert type(saved) is type(quantized) and torch.equal(saved.dequantize(), wanted) and wanted.ne(0).any()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parts_of(model: nn.Module, optimizer: torch.optim.Optimizer, mask: GradientMask | None = None) -> TrainingParts:
    return TrainingParts(model, [optimizer], None, mask, None, torch.device("cpu"), None)


def compact_parts(state_bits=32, refresh_every: int | None = None) -> TrainingParts:
    """A model that has taken one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.LayerNorm(1024), nn.Linear(1024, 512))
    mask = GradientMask(model.named_parameters(), 0.1, refresh_every=refresh_every, dense=["1.*", "0.bias"])
    optimizer = CompactAdamW(model.parameters(), state_bits=state_bits)
    mask.register(optimizer)
    model(torch.randn(4, 512)).square().sum().backward()
    optimizer.step()
    return parts_of(model, optimizer, mask)


def test_a_state_of_another_size_than_its_parameter_is_kept(tmp_path, one_rank):
    """Such as Adafactor's means over rows and columns."""
    model = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    writer = state.plan_save(tmp_path / "state", parts_of(model, optimizer), copy=False)
    writer.finish([writer.write()])
    wanted = optimizer.state_dict()["state"][0]
    other = torch.optim.Adafactor(model.parameters())
    state.restore(tmp_path / "state", parts_of(model, other), is_same_world=True)
    found = other.state_dict()["state"][0]
    assert found.keys() == wanted.keys() and {"row_var", "col_var"} <= found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_schedule_that_computes_with_numpy_is_read_back(tmp_path, one_rank):
    model = nn.Linear(4, 4)

    def parts() -> TrainingParts:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(step / 100))
        return TrainingParts(model, [optimizer], scheduler, None, None, torch.device("cpu"), None)

    before, after = parts(), parts()
    before.optimizers[0].step()
    before.lr_scheduler.step()
    writer = state.plan_save(tmp_path / "state", before, copy=False)
    writer.finish([writer.write()])
    state.restore(tmp_path / "state", after, is_same_world=True)
    assert after.lr_scheduler.last_epoch == 1
    assert after.lr_scheduler.get_last_lr() == before.lr_scheduler.get_last_lr() == [0.1 * np.cos(0.01)]
    assert after.optimizers[0].param_groups[0]["lr"] == 0.1 * np.cos(0.01)


def test_metadata_that_would_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'evil'}",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="system is not of DCP's metadata"):
        shards.ShardReader(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_what_was_copied_is_written_though_training_goes_on(tmp_path, one_rank):
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    wanted = {key: s["momentum_buffer"].clone() for key, s in optimizer.state_dict()["state"].items()}
    writer = state.plan_save(tmp_path / "state", parts_of(model, optimizer), copy=True)
    optimizer.step()
    writer.finish([writer.write()])
    state.restore(tmp_path / "state", parts_of(model, optimizer), is_same_world=True)
    found = optimizer.state_dict()["state"]
    assert all(torch.equal(found[key]["momentum_buffer"], wanted[key]) for key in wanted)


def test_the_tensors_of_a_state_are_copied_one_after_the_other(tmp_path, one_rank, monkeypatch):
    """As they are from an accelerator: here, each comes as a tensor of its own that nothing else holds."""
    values = {f"tensor{i}": torch.arange(100) + i for i in range(5)}
    given: list[weakref.ref] = []
    alive: list[int] = []
    resolve = shards._SavePlanner.resolve_data

    def resolve_to_copy(self, item):
        alive.append(sum(copy() is not None for copy in given))
        copy = resolve(self, item).numpy().copy()
        given.append(weakref.ref(copy))
        return torch.from_numpy(copy)

    monkeypatch.setattr(shards._SavePlanner, "resolve_data", resolve_to_copy)
    writer = shards.ShardWriter(tmp_path / "state", values, copy=False)
    writer.finish([writer.write()])
    assert len(alive) == 5 and max(alive) <= 1
    assert [file.name for file in (tmp_path / "state").glob("*.distcp")] == ["__0_0.distcp"]
    reader = shards.ShardReader(tmp_path / "state")
    assert all(torch.equal(reader.read_whole(name), value) for name, value in values.items())


@pytest.mark.parametrize("state_bits", [32, 8, 4, "fp8"])
def test_the_estimate_of_a_compact_state_is_what_its_files_take(state_bits, tmp_path, one_rank):
    parts = compact_parts(state_bits)
    writer = state.plan_save(tmp_path / "state", parts, copy=False)
    writer.finish([writer.write()])
    written = sum(file.stat().st_size for file in (tmp_path / "state").iterdir())
    assert space._state_bytes(parts) == pytest.approx(written, rel=0.2)  # headers, scales of blocks


def test_states_before_a_turn_are_none_and_those_of_another_optimizer_are_refused(tmp_path, one_rank):
    parts = compact_parts(refresh_every=2)
    writer = state.plan_save(tmp_path / "state", parts, copy=True)
    writer.finish([writer.write()])
    saved = shards.ShardReader(tmp_path / "state").tensors
    compact = {name.rpartition(".")[0] for name in saved if name.startswith("compact.")}
    assert compact == {"compact.2.weight", "compact.2.bias"}  # the other layer stands still until the second step
    adamw = parts_of(parts.model, torch.optim.AdamW(parts.model.parameters()), parts.mask)
    with pytest.raises(UserError, match="saved with optimizer CompactAdamW, and this run has AdamW.*as it was"):
        state.restore(tmp_path / "state", adamw, is_same_world=True)
