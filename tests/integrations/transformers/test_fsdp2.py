"""FSDP2 through accelerate, on two gloo processes: a sharded tensor is selected as if it were whole."""

import importlib.util
import json
from pathlib import Path

import accelerate
import launch
import pytest
import torch
from packaging import version

pytestmark = launch.NEEDS_FSDP2_ON_CPU
WORKER = Path(__file__).with_name("fsdp2_worker.py")

RUNS = [
    {"name": "all", "policy": {"density": 1.0}},
    {"name": "tensor", "policy": {"density": 0.2}},
    {"name": "global", "policy": {"density": 0.2, "scope": "global", "refresh_every": 2}},
    {"name": "refresh", "policy": {"density": 0.2, "refresh_every": 4}},
]
# Two trainings with the output folder of one: what stops after step 3 goes on from its checkpoint
INTERRUPTED = {"name": "interrupted", "policy": {"density": 0.2, "refresh_every": 4}}
RUNS += [{**INTERRUPTED, "stop_after": 3}, {**INTERRUPTED, "resume": True}]
COMPACT = {"density": 0.2, "refresh_every": 3, "dense": ["*norm*"], "compact": True}
UNSAVED = {"save_strategy": "no", "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}
RUNS += [
    {"name": "compact", "policy": COMPACT, "changes": UNSAVED},
    {"name": "compact_saved", "policy": COMPACT},
    {"name": "compact_ddp", "policy": COMPACT, "changes": {**UNSAVED, "fsdp": False, "fsdp_config": None}},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each run gave, in this process and in two others: {(name, processes): result}."""
    folders = {processes: tmp_path_factory.mktemp(f"processes{processes}") for processes in (1, 2)}

    spec = importlib.util.spec_from_file_location("fsdp2_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.train_all(folders[1], RUNS)

    launch.torchrun(WORKER, folders[2], json.dumps(RUNS), processes=2, log_dir=folders[2])
    return {
        (run["name"], processes): torch.load(folder / f"{run['name']}.pt")
        for processes, folder in folders.items()
        for run in RUNS
    }


def test_two_processes_do_shard(results):
    assert results["tensor", 2]["sharded"] and not results["tensor", 1]["sharded"]


@pytest.mark.parametrize("name", ["all", "tensor", "global", "refresh"])
def test_two_processes_select_as_one(results, same_bits, name):
    one, two = results[name, 1], results[name, 2]
    assert one["selected"] == two["selected"] and one["losses"] == two["losses"]
    assert same_bits(one["weights"], two["weights"]) == []
    assert name == "all" or same_bits(one["weights"], results["all", 1]["weights"]) != []


OLD_ACCELERATE = pytest.mark.skipif(
    version.parse(accelerate.__version__) < version.parse("1.13"),
    reason="accelerate before 1.13 resumes without the sharded states of the optimizer",
)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=OLD_ACCELERATE)])
def test_resumed_equals_undisturbed_inside_a_refresh_interval(results, same_bits, processes):
    resumed, undisturbed = results["interrupted", processes], results["refresh", processes]
    assert resumed["losses"] == undisturbed["losses"]
    assert same_bits(resumed["weights"], undisturbed["weights"]) == []


def test_two_processes_train_compactly_as_one(results, same_bits):
    one, two = results["compact", 1], results["compact", 2]
    assert two["sharded"] and one["selected"] == two["selected"]
    # Norms are sums over the ranks, in another order
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-6) and max(one["norms"]) > 0.5
    for name, weights in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weights, rtol=1e-4, atol=1e-6)
    assert same_bits(one["weights"], results["tensor", 1]["weights"]) != []


def test_what_two_processes_cannot_do_compactly_is_refused(results):
    assert "the Trainer's checkpoints of sharded optimizer states cannot hold" in results["compact_saved", 2]["refused"]
    assert "takes gradients before DDP reduces them over the 2 processes" in results["compact_ddp", 2]["refused"]
