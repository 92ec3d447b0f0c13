"""The benchmark of the selection: it runs from its command line, and compares what it says it compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def selection():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import selection

        yield selection
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "model, entries", [("smollm2_135m", 134_515_008), ("llama3_2_1b", 1_235_814_400), ("llama3_1_8b", 8_030_261_248)]
)
def test_shapes_are_those_of_the_model(selection, model, entries):
    assert sum(torch.Size(shape).numel() for shape in selection.MODELS[model].values()) == entries


def test_gradients_have_the_tails_of_real_ones(selection):
    shapes = {"embedding": (4000, 64), "0.q": (300, 64), "norm": (64,)}
    gradients = selection.make_gradients(shapes, torch.float32, torch.device("cpu"))
    assert {name: tuple(g.shape) for name, g in gradients.items()} == shapes
    zero_rows = (gradients["embedding"] == 0).all(1).float().mean()
    assert 0.7 < zero_rows < 0.8
    logarithms = gradients["0.q"].abs().log()
    assert abs(logarithms.mean() + 10) < 0.5 and 0.8 < logarithms.std(1).mean() < 1.2 and logarithms.mean(1).std() > 0.5
    assert abs(gradients["0.q"].sign().mean()) < 0.05


@pytest.mark.slow
def test_measures_every_method_and_writes_what_it_prints(selection, tmp_path, monkeypatch, capsys):
    shapes = {"embedding": (2000, 96), "0.q": (96, 96), "norm": (96,)}
    monkeypatch.setitem(selection.MODELS, "smollm2_135m", shapes)
    path = tmp_path / "numbers.json"
    selection.main(["--device", "cpu", "--model", "smollm2_135m", "--rounds", "1", "--json", str(path)])
    printed = capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == 2 * len(selection.METHODS)
    for row in saved["rows"]:
        assert row["entries"] == 2000 * 96 + 96 * 96 + 96 and row["median_ms"] > 0
        assert f"| {row['method']} | {row['median_ms']:.4g} |" in printed
    assert saved["environment"]["torch"] == torch.__version__


def test_a_method_that_is_not_exact_is_found_out(selection, monkeypatch):
    monkeypatch.setitem(selection.MODELS, "tiny", {"0.q": (50, 40)})
    wrong = selection.mask_by_sampled_quantile
    monkeypatch.setattr(selection, "SAMPLE", 100)
    monkeypatch.setitem(selection.METHODS, "torch.topk", wrong)
    with pytest.raises(SystemExit, match=r"torch\.topk leaves other entries"):
        selection.measure("tiny", "fp32", ["gmt-tune", "torch.topk"], 0.2, 1, torch.device("cpu"))


def test_a_missing_gpu_is_reported():
    command = [sys.executable, BENCHMARKS / "selection.py", "--device", "cuda"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert process.returncode == 2 and "this PyTorch sees no GPU" in process.stderr


@pytest.mark.slow
def test_training_steps_are_timed(selection, tmp_path, capsys):
    path = tmp_path / "steps.json"
    arguments = ["--training-step", "--batch-size", "1", "--seq-len", "16", "--rounds", "1", "--json", str(path)]
    selection.main(["--device", "cpu", *arguments])
    (row,) = json.loads(path.read_text())["rows"]
    assert 0 < row["mask_s"] < row["masked_s"] and f"{row['mask_share']:.2%}" in capsys.readouterr().out
