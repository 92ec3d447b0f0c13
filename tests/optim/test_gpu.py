"""CompactAdamW on a GPU, by its kernels, against the dense oracle. The CPU shows that the tests hold."""

import runpy
from pathlib import Path

import pytest
from optim.launches import count_launches

oracle_tests = runpy.run_path(str(Path(__file__).with_name("test_compact_adamw.py")))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_gpu)]
KEYS = [
    "refresh 7, accumulation 3, torch.float32",
    "refresh 7, accumulation 3, torch.bfloat16",
    "one entry",
    "all entries",
]


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton")
    return count_launches(monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", KEYS)
def test_equals_dense_tensors_with_a_mask(key, device, launches):
    case, steps = oracle_tests["CASES"][key], oracle_tests["worker"]["STEPS"]
    model = oracle_tests["model_of"](case).to(device)
    found = oracle_tests["worker"]["train"](case, model, lambda name, tensor: tensor.to(device))
    oracle = oracle_tests["oracle_of"](case)
    for step in range(steps):
        oracle.step(oracle_tests["gradients_of"](case, step))
        weights = {name: p.cpu() for name, p in found["weights"][step].items()}
        oracle_tests["assert_close"](weights, oracle.p, oracle_tests["EPS"][case["dtype"]], f"step {step}")
    assert (launches["gather_"] > 30 and launches["update_"] >= steps) == (device == "cuda")
