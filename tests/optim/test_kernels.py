"""Triton's kernels of CompactAdamW: in its interpreter against torch. tests/masking/test_triton.py compiles them."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.masking.search import devices
from gmt_tune.optim import states

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


@pytest.mark.parametrize("which", ["not slow", pytest.param("", marks=pytest.mark.slow)], ids=["quick", "all"])
def test_kernels_do_what_torch_does(which):
    """In a process of its own: the interpreter replaces the compiler when Triton is imported."""
    command = ["-m", "pytest", "-q", "-n", "0", "-m", which, "-p", "no:cacheprovider", str(HERE / "kernel_checks.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    assert " passed" in process.stdout and "skipped" not in process.stdout


@pytest.mark.parametrize("failing", ["place", "carry"])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_turn_whose_kernel_cannot_be_launched_is_made_by_torch(monkeypatch, failing, state_bits):
    from gmt_tune.masking import ties
    from gmt_tune.masking.search import triton as kernels
    from gmt_tune.optim import by_kernels

    found = []
    module = ties if failing == "place" else by_kernels
    for is_served in (False, True):
        monkeypatch.setattr(devices, "_failures", [])
        torch.manual_seed(0)
        p, q = (nn.Parameter(torch.randn(300, 200)) for _ in range(2))
        optimizer = CompactAdamW([p, q], lr=0.1, state_bits=state_bits)
        GradientMask([("p", p), ("q", q)], 0.1).register(optimizer)
        with warnings.catch_warnings(record=True) as caught, monkeypatch.context() as patched:
            warnings.simplefilter("always")
            for step in range(3):
                (p * torch.randn(300, 200) + q * torch.randn(300, 200)).sum().backward()
                if is_served and step == 1:
                    patched.setattr(module, "kernels_for", lambda members: None if devices._failures else kernels)
                    patched.setattr(by_kernels, "can_gather", lambda *arguments: False)
                optimizer.step()
                optimizer.zero_grad()
        assert sum("Triton is installed but does not work here" in str(w.message) for w in caught) == is_served
        moments = [states.to_floats(optimizer.state[each][key]) for each in (p, q) for key in ("exp_avg", "exp_avg_sq")]
        found.append([p.detach(), q.detach(), *moments, optimizer.state[p]["age"]])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][-1].max() == 3


@pytest.mark.parametrize("failing", ["gather", "update"])
def test_a_triton_that_cannot_compile_is_given_up_with_one_warning_and_each_update_is_made_once(monkeypatch, failing):
    """For the CPU there is no driver: what a GPU's Triton without a C compiler does, this one does here."""
    weights = {}
    for served in ((), ("cpu",)):
        monkeypatch.setattr(devices, "_SERVED", ())
        monkeypatch.setattr(devices, "_failures", [])
        torch.manual_seed(0)
        p, q = (nn.Parameter(torch.randn(300, 200)) for _ in range(2))
        optimizer = CompactAdamW([p, q], lr=0.1)
        GradientMask([("p", p), ("q", q)], 0.1, refresh_every=None).register(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                is_served = served if step > 0 else ()  # the selection is made by torch
                if failing == "gather":
                    monkeypatch.setattr(devices, "_SERVED", is_served)
                (p * torch.randn(300, 200) + q * torch.randn(300, 200)).sum().backward()
                monkeypatch.setattr(devices, "_SERVED", is_served)
                optimizer.step()
                optimizer.zero_grad()
        found = [w for w in caught if "Triton is installed but does not work here" in str(w.message)]
        assert len(found) == len(devices._failures) == len(served)
        weights[served] = torch.stack([p.detach(), q.detach()])
    assert torch.equal(*weights.values())
