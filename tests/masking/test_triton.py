"""Triton's kernels: run in its interpreter against a full sort, and compiled for GPUs that are not there."""

import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from gmt_tune import mask_grads_
from gmt_tune.masking.parts import part_of
from gmt_tune.masking.search import devices
from gmt_tune.masking.selection import ThresholdSelection, apply_

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)


def run(*arguments, **environment):
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize(("examples", "which"), [(4, "not slow"), pytest.param(50, "", marks=pytest.mark.slow)])
def test_kernels_select_what_a_full_sort_selects(examples, which):
    """In a process of its own: the interpreter replaces the compiler when Triton is imported."""
    command = ["-m", "pytest", "-q", "-n", "0", "-m", which, "-p", "no:cacheprovider", HERE / "interpreted_kernels.py"]
    # It shares strategies with test_selection
    output = run(*command, TRITON_INTERPRET="1", PYTHONPATH=str(HERE), EXAMPLES=str(examples))
    assert " passed" in output and "skipped" not in output


@pytest.mark.parametrize(
    "target",
    [["cuda:80", "few"], *(pytest.param([t], marks=pytest.mark.slow) for t in ("cuda:80", "cuda:90", "hip:gfx942"))],
)
def test_kernels_compile_for_a_gpu_and_load_16_bytes_at_a_time(target, tmp_path):
    """What the interpreter forgives, the compiler does not."""
    run(HERE / "compile_kernels.py", *target, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


def test_a_triton_that_cannot_compile_is_given_up_with_one_warning(monkeypatch):
    """For the CPU there is no driver: what a GPU's Triton without a C compiler does, this one does here."""
    monkeypatch.setattr(devices, "_SERVED", ("cpu",))
    monkeypatch.setattr(devices, "_failures", [])
    model = torch.nn.ModuleList([torch.nn.Linear(64, 33), torch.nn.Linear(33, 7)])
    with pytest.warns(UserWarning, match="Triton is installed but does not work here") as caught:
        for seed, score in enumerate(("magnitude", "saliency")):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            grads = [p.grad.clone() for p in model.parameters()]
            mask_grads_(model.parameters(), 0.2, score=score)
            for p, grad in zip(model.parameters(), grads, strict=True):
                ranked = grad if score == "magnitude" else grad * p.detach()
                threshold = ranked.abs().flatten().sort(descending=True).values[int(0.2 * p.numel()) - 1]
                assert torch.equal(p.grad, grad * (ranked.abs() >= threshold))
    assert len(caught) == 1


def test_applying_falls_back_too_and_selects_the_same(monkeypatch):
    """Compiling can fail at the second kernel only."""
    monkeypatch.setattr(devices, "_failures", [])
    monkeypatch.setattr(devices, "_SERVED", ("cpu",))
    grads = [torch.randn(50, 9), torch.randn(30)]
    parts = [part_of(grad) for grad in grads]
    scores = [grads[0].abs().sqrt(), parts[1].local]
    wanted = [grad * (score.abs() >= 0.7) for grad, score in zip(grads, scores, strict=True)]
    with pytest.warns(UserWarning, match="Triton is installed but does not work here"):
        counts = apply_(parts, [ThresholdSelection(score, torch.tensor(0.7)) for score in scores])
    for grad, count, want in zip(grads, counts, wanted, strict=True):
        assert torch.equal(grad, want) and int(count) == int((want != 0).sum()) > 0


def test_out_of_memory_is_no_reason_to_give_triton_up(monkeypatch):
    monkeypatch.setattr(devices, "_failures", [])

    def run():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        devices.try_triton(run)
    assert devices._failures == []


def test_a_failure_keeps_no_tensor_alive(monkeypatch):
    """An error knows the frames that it passed, with all gradients in them."""
    monkeypatch.setattr(devices, "_failures", [])

    def run(gradient):
        raise RuntimeError("no compiler")

    gradient = torch.ones(3)
    alive = weakref.ref(gradient)
    with pytest.warns(UserWarning, match="does not work here .RuntimeError: no compiler"):
        devices.try_triton(run, gradient)
    del gradient
    assert alive() is None and len(devices._failures) == 1
