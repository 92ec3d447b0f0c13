"""A sharded gradient is masked as if it were whole, whatever shards it: real processes against one without any."""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import torch

pytestmark = launch.NEEDS_FSDP2_ON_CPU
WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def cases():
    return runpy.run_path(str(WORKER))


@pytest.fixture(scope="module")
def unsharded(cases):
    """What one process without DTensors does, for every policy."""
    return {name: cases["run_policy"](policy, cases["Unsharded"]()) for name, policy in cases["policies"]().items()}


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Function that starts the worker in n processes, once, and gives what they found."""

    @functools.cache
    def run(n: int, by_kernels: bool = False) -> dict:
        folder = tmp_path_factory.mktemp("sharded")
        if by_kernels:  # the interpreter replaces the compiler when Triton is imported: in fresh processes
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
            environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(WORKER.parents[1])}
            subprocess.run([*command, WORKER, folder / "results.pt"], env=environment, check=True)
        else:
            launch.torchrun(WORKER, folder / "results.pt", processes=n, log_dir=folder)
        return torch.load(folder / "results.pt")

    return run


@pytest.fixture(
    scope="module",
    params=[(1,), (2,), (3,), pytest.param((4,), marks=pytest.mark.slow), (2, True)],
    ids=lambda run: f"{run[0]} processes" + ", by Triton's kernels" * len(run[1:]),
)
def results(request, torchrun):
    found = torchrun(*request.param)
    assert (found["launches"] > 100) == (request.param == (2, True))
    return found


def assert_same(found, wanted, where):
    assert torch.equal(found, wanted), f"{where}: {found} instead of {wanted}"


def test_same_entries_thresholds_and_counts_as_unsharded(results, unsharded, cases):
    wanted_cases = cases["INTERPRETED"] if results["launches"] else unsharded
    assert {key.split(" | ")[0] for key in results["policies"]} == set(wanted_cases)
    for key, steps in results["policies"].items():
        for i, (found, wanted) in enumerate(zip(steps, unsharded[key.split(" | ")[0]], strict=True)):
            where = f"{key}, step {i}"
            for name, grad in wanted["grads"].items():
                assert_same(found["grads"][name], grad, f"{where}, gradient {name}")
            assert found["thresholds"].keys() == wanted["thresholds"].keys()
            for name, threshold in wanted["thresholds"].items():
                assert found["thresholds"][name].dtype == threshold.dtype, where
                assert_same(found["thresholds"][name], threshold, f"{where}, threshold {name}")
            assert found["selected"] == wanted["selected"], where
            assert found["density"] == wanted["density"], where


def test_the_cases_mask_something_and_differ_from_each_other(unsharded):
    """What shows that the comparison above can fail."""
    for key, steps in unsharded.items():
        kept = [torch.cat([g.flatten() != 0 for g in step["grads"].values()]) for step in steps]
        assert 0.1 < kept[0].float().mean() < 0.5, key
    seen = [torch.cat([g.flatten() for g in steps[0]["grads"].values()]).float() for steps in unsharded.values()]
    assert len({tuple(s.tolist()) for s in seen}) >= 20


def test_all_ranks_find_the_same(results):
    assert results["all ranks found the same"]


def test_mask_grads_masks_sharded_gradients_as_whole_ones(results, cases):
    found = results["function"]
    for key, wanted in cases["run_function"](cases["Unsharded"]()).items():
        for field in ("grads", "thresholds"):
            for a, b in zip(found[key][field], wanted[field], strict=True):
                assert_same(a, b, f"{key}, {field}")
        assert found[key]["selected"] == wanted["selected"], key


def test_a_step_costs_few_collectives_and_megabytes_for_30_layers(torchrun):
    counted = torchrun(2)["collectives"]  # what a rank sends does not depend on their number
    assert len(counted) == 6
    for policy, (collectives, sent, tensors, kinds) in counted.items():
        assert tensors == 272
        assert kinds == {"allreduce_"}, "gradients themselves were sent"
        assert 0 < collectives < 4, policy
        assert sent < (1e6 if "bf16" in policy else 5e6), policy


def test_nan_on_one_rank_is_told_on_all(results):
    assert results["nonfinite"] and all(results["nonfinite"].values())
    for policy, messages in results["nonfinite"].items():
        for message in messages:
            assert "'odder' holds NaN or infinity at optimizer step 2" in message, (policy, messages)


def test_nan_of_a_dense_parameter_on_one_rank_is_told_on_all(results):
    assert results["dense nonfinite"]
    for message in results["dense nonfinite"]:
        assert "'odder' holds NaN or infinity at optimizer step 1" in message


def test_each_rank_loads_its_own_selection_and_refuses_that_of_another(results):
    wanted = {"rows", "FSDP2"} | (set() if results["launches"] else {"columns", "flat ranges"})
    assert results["loaded"].keys() >= wanted
    for layout, messages in results["loaded"].items():
        for rank, message in enumerate(messages):
            assert message["own"] == "loaded", (layout, rank)
            if rank == 0:
                assert message["rank 0's"] == "loaded", layout
            else:
                assert "was saved by a rank that held the entries" in message["rank 0's"], (layout, rank)
