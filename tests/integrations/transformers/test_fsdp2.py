"""FSDP2 through accelerate, on two gloo processes: a sharded tensor is selected as if it were whole."""

import importlib.util
import json
from pathlib import Path

import launch
import pytest
import torch

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


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_equals_undisturbed_inside_a_refresh_interval(results, same_bits, processes):
    resumed, undisturbed = results["interrupted", processes], results["refresh", processes]
    assert resumed["losses"] == undisturbed["losses"]
    assert same_bits(resumed["weights"], undisturbed["weights"]) == []
