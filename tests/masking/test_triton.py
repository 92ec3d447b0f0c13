"""Triton's kernels: run in its interpreter against a full sort, and compiled for GPUs that are not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_kernels_select_what_a_full_sort_selects():
    """In a process of its own: the interpreter replaces the compiler when Triton is imported."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted_kernels.py"]
    output = run(*command, TRITON_INTERPRET="1", PYTHONPATH=str(HERE))  # it shares strategies with test_selection
    assert " passed" in output and "skipped" not in output


@pytest.mark.parametrize(
    "target",
    [["cuda:80", "few"], *(pytest.param([t], marks=pytest.mark.slow) for t in ("cuda:80", "cuda:90", "hip:gfx942"))],
)
def test_kernels_compile_for_a_gpu_and_load_16_bytes_at_a_time(target, tmp_path):
    """What the interpreter forgives, the compiler does not."""
    run(HERE / "compile_kernels.py", *target, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
