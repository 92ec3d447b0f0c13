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
    args = SimpleNamespace(model="tiny", device="cpu", batch_size=2, seq_len=64, warmup=1, steps=2, threads=1)
    lines = []
    with torch.compiler.set_stance("force_eager"):  # torchao's updates compile for 20 s a shape
        for optimizer in benchmark.OPTIMIZERS:
            lines += [benchmark.measure(optimizer, density, args) for density in (None, 0.2)]
    for plain, masked in zip(lines[::2], lines[1::2], strict=True):
        assert plain["kept"] is None and 0.05 < masked["kept"] < 0.3
        assert len(masked["seconds"]) == 2 and masked["tokens_per_second"] > 0 and masked["peak_gib"] is None
    assert len(benchmark.table(lines).splitlines()) == 2 + len(lines)


def test_the_table_compares_with_the_line_without_a_mask(benchmark):
    lines = [
        {"optimizer": "AdamW", "density": None, "tokens_per_second": 20_000.0, "peak_gib": 12.5},
        {"optimizer": "AdamW", "density": 0.2, "tokens_per_second": 19_000.0, "peak_gib": 12.75},
    ]
    assert benchmark.table(lines).splitlines()[2:] == [
        "| AdamW | none | 20,000 |  | 12.50 |  |",
        "| AdamW | density 0.2 | 19,000 | -5.0% | 12.75 | +0.25 |",
    ]


def test_the_large_model_has_the_size_of_llama_3_2_1b(benchmark):
    from torchtune.models.llama3_2 import llama3_2, llama3_2_1b

    with torch.device("meta"):
        wanted = llama3_2_1b()
        found = llama3_2(max_seq_len=2048, **benchmark.SIZES["llama3_2_1b"])
    assert [(n, p.shape) for n, p in found.named_parameters()] == [(n, p.shape) for n, p in wanted.named_parameters()]
