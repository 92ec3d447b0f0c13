"""The table of training with and without the mask: made on the CPU with a tiny model, by the same functions."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_training.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_training", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measures_each_optimizer_with_and_without_the_mask(benchmark):
    args = SimpleNamespace(
        model="tiny", device="cpu", batch_size=2, seq_len=64, accumulation=2, warmup=1, steps=2, threads=1, density=0.2
    )
    lines = []
    with torch.compiler.set_stance("force_eager"):  # torchao's updates compile for 20 s a shape
        for optimizer in benchmark.OPTIMIZERS:
            lines += benchmark.measure(optimizer, args)
    compact = lines.pop()
    assert compact["optimizer"] == "CompactAdamW" and compact["density"] == 0.05 and compact["tokens_per_second"] > 0
    for plain, masked in zip(lines[::2], lines[1::2], strict=True):
        assert plain["kept"] is None and 0.05 < masked["kept"] < 0.3
        assert len(masked["seconds"]) == 2 and masked["tokens_per_second"] > 0 and masked["peak_gib"] is None
    assert len(benchmark.table([*lines, compact]).splitlines()) == 3 + len(lines)


def test_the_table_compares_with_the_line_without_a_mask(benchmark):
    lines = [
        {"optimizer": "AdamW", "density": None, "tokens_per_second": 20_000.0, "peak_gib": 12.5, "estimated_gib": 13.0},
        {"optimizer": "AdamW", "density": 0.2, "tokens_per_second": 19_000.0, "peak_gib": 12.75, "estimated_gib": None},
    ]
    assert benchmark.table(lines).splitlines()[2:] == [
        "| AdamW | none | 20,000 |  | 12.50 |  | 13.00 |",
        "| AdamW | density 0.2 | 19,000 | -5.0% | 12.75 | +0.25 |  |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2_135m", "llama3_2_1b", "llama3_1_8b"])
def test_estimates_are_those_of_the_models_config(benchmark, model):
    args = SimpleNamespace(model=model, batch_size=2, seq_len=2048, accumulation=2)
    estimates = [benchmark.estimate_of(name, args) for name in ("AdamW", "AdamW8bit", "CompactAdamW")]
    entries = {"smollm2_135m": 0.135, "llama3_2_1b": 1.24, "llama3_1_8b": 8.03}[model] * 1e9 / 2**30
    assert estimates[0] - estimates[1] == pytest.approx(2 * entries, rel=0.1)  # states of 4 and of 2 bytes an entry
    assert estimates[1] - estimates[2] > 2 * entries  # and gradients of 2
