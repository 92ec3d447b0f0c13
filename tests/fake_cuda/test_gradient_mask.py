"""A masked step on CUDA: all tensors meet on the device, the host waits for nothing, and launches stay few."""

import pytest
import torch
from fake_cuda.steps import parameters, run, set_gradients

from gmt_tune import GradientMask, mask_grads_
from gmt_tune.masking.nonfinite import DelayedFlags

pytestmark = pytest.mark.fake_cuda


class Own(GradientMask):
    def compute_score(self, name, parameter, grad):
        return grad.abs().sqrt() + parameter.detach().abs()


def masked_sgd(held, score="magnitude", **arguments):
    """An optimizer with a mask; its own work is one launch."""
    optimizer = torch.optim.SGD(held.values(), lr=0.1, foreach=True)
    kind, named = (Own, {}) if score == "own" else (GradientMask, {"score": score})
    mask = kind(held.items(), arguments.pop("density", 0.2), **named, **arguments)
    mask.register(optimizer)
    return mask, optimizer


# Launches of a step besides the optimizer's own, at the most: docs/performance.md has them by name
NEW_SELECTION = {torch.bfloat16: 27, torch.float32: 35}
PACKING, KEPT, LOOK_AT_GRADIENTS = 2, 7, 8


def most_launches(score, dtype, refresh_every, is_new, checks) -> int:
    if score == "random" or not is_new:  # a draw is made again in each step
        return KEPT + LOOK_AT_GRADIENTS * checks
    looks = LOOK_AT_GRADIENTS if score == "saliency" and checks else 0  # products say little of gradients
    return NEW_SELECTION[dtype] + (PACKING if refresh_every != 1 else 0) + looks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("refresh_every", [1, 3, None])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random", "own"])
def test_steps_read_nothing_and_launch_as_often_for_any_number_of_tensors(score, scope, refresh_every, dtype):
    from gmt_tune.memory.simulation.gpu import SimulatedGPU

    launched = []
    for times, checks in ((1, False), (2, False), (2, True)):
        with SimulatedGPU() as gpu:
            held = parameters(times, dtype)
            arguments = dict(scope=scope, refresh_every=refresh_every, error_if_nonfinite=checks)
            mask, optimizer = masked_sgd(held, score, **arguments)
            steps = run(gpu, held.values(), optimizer.step, times=3)
        launched.append([step.launched - 1 for step in steps])
        for step in steps:
            assert not step.reads
            # The flags of gradients that are not finite arrive behind the step's launches
            assert list(step.late_reads.values()) == ([1] if checks else [])
        if score != "own":
            is_new = [refresh_every == 1 or (refresh_every == 3 and number % 3 == 0) for number in (1, 2, 3)]
            most = [most_launches(score, dtype, refresh_every, new, checks) for new in is_new]
            assert all(found <= limit for found, limit in zip(launched[-1], most, strict=True)), (launched, most)
    if score != "own":  # whose scores are made, ranked and freed one by one
        assert launched[0] == launched[1]
    elif scope == "tensor" and refresh_every == 1:
        assert launched[1][0] <= 2 * launched[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_and_frozen_parameters_and_density_one(gpu, dtype):
    held = parameters(2, dtype)
    mask, optimizer = masked_sgd(held, dense=["p1", "p3"], frozen=["p0"])
    live = [p for name, p in held.items() if name != "p0"]
    most = NEW_SELECTION[dtype] + LOOK_AT_GRADIENTS + 1  # of dense ones, gradients are looked at
    assert all(not step.reads and step.launched - 1 <= most for step in run(gpu, live, optimizer.step))
    assert held["p0"].grad is None and not held["p0"].requires_grad

    whole = parameters(2, dtype)
    mask, optimizer = masked_sgd(whole, density=1.0, error_if_nonfinite=False)
    assert [step.launched - 1 for step in run(gpu, whole.values(), optimizer.step)] == [0] * 4


def test_tensors_of_other_layouts_and_dtypes(gpu):
    """Gaps in memory take PyTorch's own operations, and two dtypes are launched apart."""
    held = parameters(1) | {f"{name}f": p for name, p in parameters(1, torch.float32).items()}
    held["strided"] = torch.nn.Parameter(torch.empty(900, 257, dtype=torch.bfloat16, device="cuda")[:, ::3])
    held["transposed"] = torch.nn.Parameter(torch.empty(300, 700, dtype=torch.bfloat16, device="cuda").T)
    held["empty"] = torch.nn.Parameter(torch.empty(0, 7, dtype=torch.bfloat16, device="cuda"))
    for score in ("magnitude", "saliency", "random", "own"):
        for refresh_every in (1, 2):
            mask, optimizer = masked_sgd(held, score, refresh_every=refresh_every)
            assert all(not step.reads for step in run(gpu, held.values(), optimizer.step, times=2))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_without_a_hook(gpu, scope):
    held = parameters()
    set_gradients(held.values())
    mask_grads_(held.values(), 0.2, scope=scope, error_if_nonfinite=False)
    assert not gpu.reads
    gpu.reset()
    mask_grads_(held.values(), 0.2, scope=scope)  # raises before anything is changed, so it waits
    assert list(gpu.reads.values()) == [1]

    mask = GradientMask(held.items(), 0.2, scope=scope, refresh_every=2)
    for step in run(gpu, held.values(), mask.mask_grads_):
        assert sum(step.reads.values()) + sum(step.late_reads.values()) == 1


def test_statistics_and_metrics_are_read_in_one_transfer(gpu):
    held = parameters(5)
    mask, optimizer = masked_sgd(held, error_if_nonfinite=False)
    run(gpu, held.values(), optimizer.step, times=1)
    gpu.reset()
    mask.metrics()
    mask.statistics.read()
    assert mask.statistics.density == 0.0 and list(gpu.reads.values()) == [1]


def test_an_optimizer_for_each_parameter(gpu):
    """As optimizer in backward has them: each waits for its own flags, or for nothing."""
    for checks in (False, True):
        held = parameters()
        mask = GradientMask(held.items(), 0.2, error_if_nonfinite=checks)
        optimizers = [torch.optim.SGD([p], lr=0.1, foreach=True) for p in held.values()]
        for optimizer in optimizers:
            mask.register(optimizer)
        for step in run(gpu, held.values(), lambda these=optimizers: [optimizer.step() for optimizer in these]):
            assert not step.reads and sum(step.late_reads.values()) == (len(held) if checks else 0)
            assert step.launched <= len(held) * (NEW_SELECTION[torch.bfloat16] + 1)


def test_a_closure_computes_the_gradients(gpu):
    held = parameters()
    mask, optimizer = masked_sgd(held)

    def closure() -> float:
        set_gradients(held.values())
        return 0.0

    assert all(not step.reads for step in run(gpu, held.values(), lambda: optimizer.step(closure)))


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random", "own"])
def test_without_triton_nothing_is_read_either(gpu, score, scope, refresh_every):
    held = parameters()
    mask, optimizer = masked_sgd(held, score, scope=scope, refresh_every=refresh_every)
    steps = run(gpu, held.values(), optimizer.step)
    assert not any(name.endswith("_kernel") for step in steps for name in step.launches)
    assert all(not step.reads for step in steps)


@pytest.mark.parametrize("with_triton", [True, False])
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random", "own"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_sharded_gradients(ranks, request, score, scope, number, with_triton):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not with_triton:
        request.getfixturevalue("without_triton")
    gpu, mesh = ranks(number)
    for refresh_every in (1, 3):
        launched = []
        for times in (1, 2):
            held = parameters(times, place=lambda t: DTensor.from_local(t, mesh, [Shard(0)], run_check=False))
            whole = torch.empty(300, 30, dtype=torch.bfloat16, device="cuda")
            held["whole"] = torch.nn.Parameter(DTensor.from_local(whole, mesh, [Replicate()], run_check=False))
            mask, optimizer = masked_sgd(held, score, scope=scope, refresh_every=refresh_every)
            steps = run(gpu, held.values(), optimizer.step, times=3)
            assert all(not step.reads for step in steps)
            launched.append([step.launches for step in steps])
        if with_triton and score != "own":
            for few, many in zip(*launched, strict=True):
                kernels = [{k: n for k, n in each.items() if k.endswith("_kernel")} for each in (few, many)]
                assert kernels[0] == kernels[1]


def test_a_saved_state_is_loaded_onto_the_device(gpu):
    held = parameters()
    mask, optimizer = masked_sgd(held, refresh_every=3)
    run(gpu, held.values(), optimizer.step, times=1)
    saved = mask.state_dict()
    saved["selections"] = {name: bits.cpu() for name, bits in saved["selections"].items()}
    gpu.reset()
    restored, optimizer = masked_sgd(held, refresh_every=3)
    restored.load_state_dict(saved)
    assert {selection.bits.device.type for selection in restored._selections.values()} == {"cuda"}
    run(gpu, held.values(), optimizer.step, times=0)
    assert restored.step == 3


def test_flags_are_copied_to_pinned_memory_and_read_behind_the_step(gpu):
    flags = DelayedFlags()
    gpu.reset()
    flags.add(["p"], [torch.zeros((), dtype=torch.bool, device="cuda")], "")
    assert not gpu.reads and not gpu.late_reads
    torch.zeros(4, device="cuda")  # the step
    flags.raise_if_set()
    assert not gpu.reads and list(gpu.late_reads.values()) == [1]


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a_step_waits_for_flags_when_all_of_it_is_launched(gpu, monkeypatch, score):
    held = parameters()
    mask, optimizer = masked_sgd(held, score)
    run(gpu, held.values(), optimizer.step, times=0)
    set_gradients(held.values())
    launched_before = []
    read = gpu.read
    monkeypatch.setattr(
        gpu, "read", lambda *a, **k: (launched_before.append(sum(gpu.launches.values())), read(*a, **k))
    )
    gpu.reset()
    optimizer.step()
    assert launched_before == [sum(gpu.launches.values())]
