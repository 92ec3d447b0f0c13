"""CompactAdamW on a GPU, by its kernels, against the dense oracle. The CPU shows that the tests hold."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from optim.launches import count_launches
from torch import nn

from gmt_tune import CompactAdamW, GradientMask

HERE = Path(__file__).parent
oracle_tests = runpy.run_path(str(HERE / "test_compact_adamw.py"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_gpu)]


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton")
    return count_launches(monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", oracle_tests["CASES"])
def test_equals_dense_tensors_with_a_mask(key, device, launches):
    case, steps = oracle_tests["CASES"][key], oracle_tests["worker"]["STEPS"]
    model = oracle_tests["model_of"](case).to(device)
    found = oracle_tests["worker"]["train"](case, model, lambda name, tensor: tensor.to(device))
    oracle = oracle_tests["oracle_of"](case)
    for step in range(steps):
        oracle.step(oracle_tests["gradients_of"](case, step))
        weights = {name: p.cpu() for name, p in found["weights"][step].items()}
        oracle_tests["assert_close"](weights, oracle.p, oracle_tests["EPS"][case["dtype"]], f"step {step}")
    assert (launches["gather_"] > 0 and launches["update_"] >= steps) == (device == "cuda")


@pytest.mark.needs_gpu
def test_kernels_do_what_torch_does():
    command = ["-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", str(HERE / "kernel_checks.py")]
    process = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    assert " passed" in process.stdout


def train(device, dtype, state_bits, steps, rounds, density, refresh_every=3, watch=lambda step: None) -> dict:
    """Weights after steps of tensors large enough to be quantized, with accumulation, clipping and turns."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    shapes = {"layers.0.w": (512, 513), "layers.1.w": (300, 4096), "norm": (512,)}
    weights = {name: nn.Parameter(normal(*shape)) for name, shape in shapes.items()}
    mask = GradientMask(weights.items(), density, refresh_every=refresh_every, dense=["norm"])
    optimizer = CompactAdamW(
        weights.values(), lr=0.01, state_bits=state_bits, bf16_stochastic_round=rounds, max_grad_norm=1.0
    )
    mask.register(optimizer)
    torch.manual_seed(0)
    gradients = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(2 * steps)]
    for step in range(steps):
        for gradient in gradients[2 * step : 2 * step + 2]:
            sum((p * gradient[name]).sum() for name, p in weights.items()).backward()
        watch(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in weights.items()}


@pytest.mark.needs_gpu
@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_bits", [32, 8, 4, "fp8"])
def test_a_gpu_trains_as_the_cpu_does(state_bits, dtype, density):
    """But for sums in another order, which move a moment of few bits to the next one now and then."""
    ours, wanted = (train(device, dtype, state_bits, 7, False, density) for device in ("cuda", "cpu"))
    for name, weight in wanted.items():
        off = (ours[name].cpu().float() - weight.float()).abs()
        smallest = 1e-5 if dtype == torch.float32 else 2**-7 * weight.float().abs()
        assert (off > smallest).float().mean() < 0.02, name


@pytest.mark.needs_gpu
@pytest.mark.parametrize("state_bits", [32, 8])
def test_the_same_seed_trains_the_same_weights(state_bits):
    runs = [train("cuda", torch.bfloat16, state_bits, 7, True, 0.05) for _ in range(2)]
    assert all(torch.equal(runs[0][name], p) for name, p in runs[1].items())
    nearest = train("cuda", torch.bfloat16, state_bits, 7, False, 0.05)
    assert any(not torch.equal(runs[0][name], p) for name, p in nearest.items())


@pytest.mark.needs_gpu
@pytest.mark.parametrize("state_bits", [32, 8])
def test_steps_between_turns_do_not_wait_for_the_device(state_bits):
    def watch(step: int) -> None:
        if step == 1:  # the first backward pass is over, and the selection is made once
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train("cuda", torch.bfloat16, state_bits, 5, True, 0.05, refresh_every=None, watch=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [f"{w.filename}:{w.lineno} {w.message}" for w in caught if "called a synchronizing" in str(w.message)] == []


@pytest.mark.needs_gpu
@pytest.mark.parametrize("state_bits", [32, 8])
def test_steps_with_turns_wait_for_the_device_as_often_however_many_tensors_are_due(state_bits):
    waits = []
    for number in (2, 9):
        weights = {str(i): nn.Parameter(torch.randn(300, 400 + i, device="cuda")) for i in range(number)}
        optimizer = CompactAdamW(weights.values(), state_bits=state_bits)
        GradientMask(weights.items(), 0.05).register(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                sum((p * torch.randn_like(p)).sum() for p in weights.values()).backward()
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn" if step > 1 else "default")
                try:
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                optimizer.zero_grad()
        waits.append([f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)])
    assert waits[0] == waits[1] and 1 <= len(waits[0]) <= 4, waits
