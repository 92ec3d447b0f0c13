"""Optimizers behind the mask on CUDA: PyTorch's, torchao's, and CompactAdamW with what it takes in during backward."""

from collections import Counter
from unittest import mock

import pytest
import torch
from fake_cuda.steps import parameters, run, set_gradients

from gmt_tune import CompactAdamW, GradientMask

pytestmark = pytest.mark.fake_cuda

MASK_LAUNCHES = 27  # of a new selection, as in test_gradient_mask.py


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        (torch.optim.AdamW, {"fused": True}, 2),
        (torch.optim.AdamW, {"foreach": True}, 16),
        (torch.optim.AdamW, {}, 16),
        (torch.optim.AdamW, {"foreach": False}, None),  # a loop over the tensors
        (torch.optim.SGD, {"momentum": 0.9, "foreach": True}, 4),
    ],
)
def test_pytorchs_optimizers(gpu, kind, options, most):
    launched = []
    for times in (1, 3):
        held = parameters(times)
        optimizer = kind(held.values(), lr=1e-3, **options)
        GradientMask(held.items(), 0.2).register(optimizer)

        def step(held=held, optimizer=optimizer) -> None:
            torch.nn.utils.clip_grad_norm_(held.values(), 1.0)
            optimizer.step()

        set_gradients(held.values())
        gpu.reset()
        torch.nn.utils.clip_grad_norm_(held.values(), 1.0)
        assert not gpu.reads
        clipping = sum(gpu.launches.values())
        steps = run(gpu, held.values(), step)
        assert all(not found.reads for found in steps)
        launched += [found.launched - clipping for found in steps]
    if most is not None:
        assert max(launched) == min(launched) <= MASK_LAUNCHES + most


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchaos_optimizers(gpu, name, rounds):
    import torchao.optim

    from gmt_tune.memory.simulation.recipe import simulated_compile

    gpu.enter_context(mock.patch.object(torch, "compile", simulated_compile(gpu)))
    held = parameters(2)
    optimizer = getattr(torchao.optim, name)(held.values(), lr=1e-3, bf16_stochastic_round=rounds)
    GradientMask(held.items(), 0.2, refresh_every=2).register(optimizer)
    for step in run(gpu, held.values(), optimizer.step):
        assert not step.reads and step.launches["compiled single_param_adam"] == len(held)
        assert step.launched <= MASK_LAUNCHES + 2 + len(held)


# ---------------------------------------------------------------------- CompactAdamW


def compact(gpu, held, state_bits=32, density=0.1, **arguments):
    from gmt_tune.memory.simulation import selecting

    for owner, name, value in selecting.patches(gpu, density):  # or nothing would be selected
        gpu.enter_context(mock.patch.object(owner, name, value))
    options = {key: arguments.pop(key) for key in ("max_grad_norm", "bf16_stochastic_round") if key in arguments}
    mask = GradientMask(held.items(), density, dense=["p3"], **arguments)
    optimizer = CompactAdamW(held.values(), lr=1e-3, state_bits=state_bits, **options)
    mask.register(optimizer)
    return mask, optimizer


def backward(held) -> None:
    sum((p * torch.empty_like(p)).sum() for p in held.values()).backward()


def steps_of(gpu, held, optimizer, *, times=5, micro_batches=2):
    """Reads of each step's backward passes, and reads and launches of its end, in which gradients are scaled."""
    found = []
    for _ in range(times):
        gpu.reset()
        for _ in range(micro_batches):
            backward(held)
        in_backward = Counter(gpu.reads)
        gpu.reset()
        optimizer.scale_gradients_(torch.empty((), device="cuda"))
        optimizer.step()
        found.append((in_backward, Counter(gpu.reads), Counter(gpu.launches)))
        optimizer.zero_grad(set_to_none=len(found) % 2 == 0)
    return found


COUNTS = "search/triton.py"  # where the number of selected entries is read, to make room for them


@pytest.mark.parametrize("refresh_every", [1, 4, None])
@pytest.mark.parametrize("state_bits", [32, 8, 4, "fp8"])
def test_compact_adamw_reads_the_counts_alone(gpu, state_bits, refresh_every):
    launched = []
    for times in (1, 3):
        held = parameters(times)
        mask, optimizer = compact(
            gpu, held, state_bits, refresh_every=refresh_every, max_grad_norm=1.0, bf16_stochastic_round=True
        )
        begins = 1 if refresh_every != 4 else 5  # states and their tables of codes are made at the first turns
        for number, (in_backward, reads, launches) in enumerate(steps_of(gpu, held, optimizer, times=begins + 4)):
            if number < begins:
                continue
            assert not in_backward
            is_due = refresh_every == 1 or (refresh_every == 4 and len(held) > 4)
            counts = {where: n for where, n in reads.items() if COUNTS in where}
            others = {where for where in reads if COUNTS not in where}
            if refresh_every is None:
                assert not reads
            elif state_bits in (32, 8):
                assert not others and (list(counts.values()) == [1] if is_due else sum(counts.values()) <= 1)
            else:  # no kernels serve these: where each due tensor's blocks end is read besides
                assert all("masking/places.py" in where for where in others)
            if number == begins:
                launched.append(launches)
    if state_bits in (32, 8) and refresh_every != 4:
        kernels = [{name: n for name, n in each.items() if name.endswith("_kernel")} for each in launched]
        assert kernels[0] == kernels[1]
        assert sum(launched[1].values()) == sum(launched[0].values())


@pytest.mark.usefixtures("without_triton")
@pytest.mark.parametrize("state_bits", [32, 8, 4, "fp8"])
def test_compact_adamw_without_triton_reads_where_it_selects_alone(gpu, state_bits):
    held = parameters()
    mask, optimizer = compact(gpu, held, state_bits, refresh_every=None)
    first, *others = steps_of(gpu, held, optimizer)
    assert first[1] and all(not in_backward and not reads for in_backward, reads, _ in others)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_compact_adamw_of_sharded_parameters(ranks, state_bits, number):
    from torch.distributed.tensor import DTensor, Shard

    gpu, mesh = ranks(number)
    held = parameters(place=lambda t: DTensor.from_local(t, mesh, [Shard(0)], run_check=False))
    mask, optimizer = compact(gpu, held, state_bits, max_grad_norm=1.0)
    reads = [(in_backward, reads) for in_backward, reads, _ in steps_of(gpu, held, optimizer, micro_batches=1)]
    assert all(not in_backward for in_backward, _ in reads)
    assert all(reads[-1][1].values()) and sum(reads[-1][1].values()) <= 4


@pytest.mark.parametrize("state_bits", [32, 8, 4, "fp8"])
def test_compact_states_are_loaded_from_the_cpu(gpu, state_bits):
    held = parameters()
    mask, optimizer = compact(gpu, held, state_bits, refresh_every=2)
    steps_of(gpu, held, optimizer, times=3)
    saved_mask, saved = mask.state_dict(), optimizer.state_dict()
    saved_mask["selections"] = {name: bits.cpu() for name, bits in saved_mask["selections"].items()}
    saved["state"] = {
        number: {key: value.cpu() for key, value in state.items()} for number, state in saved["state"].items()
    }
    mask, optimizer = compact(gpu, held, state_bits, refresh_every=2)
    mask.load_state_dict(saved_mask)
    optimizer.load_state_dict(saved)
    kept = mask._selections  # a simulation knows no bits, so it would find none selected in those that are loaded
    devices = {value.device.type for state in optimizer.state.values() for value in state.values()}
    devices |= {selection.bits.device.type for selection in kept.values()}
    assert devices == {"cuda"}
    name = next(iter(kept))
    p, count = held[name], 5000
    for key, dtype in (("exp_avg", torch.float32), ("exp_avg_sq", torch.float32), ("age", torch.int16)):
        optimizer.load_compact_state(p, key, torch.empty(count, dtype=dtype, device="cpu"), count)
        assert optimizer.state[p][key].device.type == "cuda"
