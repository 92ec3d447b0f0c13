"""A state that several ranks saved, on another number of ranks: the same values, and only those that are needed."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gmt_tune.integrations.torchtune import training_state
from gmt_tune.masking.packing import pack_selection, unpack_selection

ROWS, COLUMNS = 37, 3  # rows of an odd length: ranks begin within a byte of the bits


def parts_of(moment: torch.Tensor, selected: torch.Tensor, world_size: int) -> list[dict]:
    """What each of ``world_size`` ranks saves of a tensor that FSDP2 shards by rows."""
    rows = -(-len(moment) // world_size)
    parts = []
    for rank in range(world_size):
        own = slice(rank * rows, (rank + 1) * rows)
        parts.append(
            {
                "optimizer": {"w": {"exp_avg": (moment[own].clone(), True, False), "step": 3}},
                "mask": {"selections": {"w": pack_selection(selected[own].clone())}, "step": 3},
                "tracker": None,
                "local_numel": {"w": moment[own].numel()},
            }
        )
    return parts


@pytest.mark.parametrize("saved_by", [1, 2, 3, 5, 36])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
def test_each_rank_gets_its_own_rows_and_bits(saved_by, world_size, monkeypatch):
    moment, selected = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS) > 0
    parts = parts_of(moment, selected, saved_by)
    rows = -(-ROWS // world_size)
    moments, bits = [], []
    for rank in range(world_size):
        start, stop = min(rank * rows, ROWS), min((rank + 1) * rows, ROWS)
        monkeypatch.setattr(training_state, "_local_rows", lambda name, p, own=(start, stop): own)
        state = training_state._reshard(parts, {"w": moment})
        assert state["optimizer"]["w"]["step"] == 3 and state["rng"] is None
        moments.append(state["optimizer"]["w"]["exp_avg"][0])
        bits.append(unpack_selection(state["mask"]["selections"]["w"], (stop - start) * COLUMNS))
    assert torch.equal(torch.cat(moments), moment)
    assert torch.equal(torch.cat(bits), selected.reshape(-1))


def test_a_quantized_state_is_made_whole_by_rows():
    from torchao.optim.subclass_8bit import OptimState8bit

    wanted, parts = [], []
    for _ in range(3):
        state = OptimState8bit.zeros((16, 256))
        state.copy_(torch.randn(16, 256))
        parts.append(state)
        wanted.append(state.dequantize())
    assert torch.equal(training_state._own_rows(parts, 10, 40), torch.cat(wanted)[10:40])


@pytest.mark.parametrize(
    "kind", ["subclass_8bit.OptimState8bit", "subclass_4bit.OptimState4bit", "subclass_fp8.OptimStateFp8"]
)
def test_a_copy_of_a_quantized_state_does_not_change_with_it(kind):
    module, _, name = kind.partition(".")
    state = getattr(importlib.import_module(f"torchao.optim.{module}"), name).zeros((4096,))
    state.copy_(torch.randn(4096))
    wanted = state.dequantize()
    saved, _, _ = training_state._to_cpu(state, True)
    state.copy_(torch.zeros(4096))
    assert type(saved) is type(state) and torch.equal(saved.dequantize(), wanted) and wanted.ne(0).any()


def test_a_tensor_that_is_not_sharded_is_taken_from_one_rank():
    moment, selected = torch.randn(5, 3), torch.randn(5, 3) > 0
    parts = parts_of(moment, selected, 1) * 2
    for part in parts:
        part["optimizer"]["w"]["exp_avg"] = (moment, False, False)
    state = training_state._reshard(parts, {"w": moment})
    assert torch.equal(state["optimizer"]["w"]["exp_avg"][0], moment)
    assert torch.equal(unpack_selection(state["mask"]["selections"]["w"], 15), selected.reshape(-1))


def own_memory() -> int:
    """Bytes of this process that are not a file's."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_on_another_number_of_ranks_a_rank_reads_only_what_it_needs(tmp_path):
    """Four ranks saved 128 MB; one of sixteen, whose rows the first of them had, holds no more than its 8 MB."""
    names = [f"layers.{i}.weight" for i in range(8)]
    for rank in range(4):
        state = {
            "optimizer": {name: {"exp_avg": (torch.full((256, 4096), float(rank)), True, False)} for name in names},
            "local_numel": {name: 256 * 4096 for name in names},
        }
        torch.save(state, tmp_path / training_state.state_file(rank))
    del state
    parameters = {name: nn.Parameter(torch.empty(1024, 4096, device="meta")) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "_local_rows", lambda name, p: (0, 64))
        before = own_memory()
        parts = training_state._read_all(tmp_path, 4)
        state = training_state._reshard(parts, parameters)
        held = own_memory() - before
    moments = [state["optimizer"][name]["exp_avg"][0] for name in names]
    assert all(moment.shape == (64, 4096) and moment.eq(0).all() for moment in moments) and len(moments) == 8
    assert held < 24e6  # it may have been this process's before
    for rank in range(4):  # nothing refers to the files any more
        (tmp_path / training_state.state_file(rank)).write_bytes(b"")
    del parts
    assert all(moment.eq(0).all() for moment in moments)
