"""The benchmark of whole training steps: a process for each method, whose peak is read from outside."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--model", "gmt_tune.models.tiny.tiny_llama", "--seq-len", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def compact_training():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import compact_training

        yield compact_training
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_measures_each_method_in_a_process_and_writes_what_it_prints(compact_training, tmp_path, capsys):
    methods = ["torch AdamW, fused", "CompactAdamW, 32 bits, density 0.05"]
    path = tmp_path / "numbers.json"
    chosen = [word for method in methods for word in ("--method", method)]
    compact_training.main([*TINY, *chosen, "--rounds", "2", "--refresh-every", "2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    printed = capsys.readouterr().out
    for row in rows:
        assert len(row["times_s"]) == 2 and min(row["times_s"]) > 0
        assert 2**27 < row["before_bytes"] <= row["peak_bytes"] < 2**32  # Python with torch, and a small model
        assert f"| {row['peak_bytes'] / 2**20:.0f} |" in printed
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0


@pytest.mark.parametrize(
    "name", ["torch AdamW, fused", "torch AdamW, fused, mask 0.2", "CompactAdamW, 8 bits, density 0.05"]
)
def test_a_step_moves_what_its_method_lets_move(compact_training, name):
    settings = compact_training.Settings("gmt_tune.models.tiny.tiny_llama", "fp32", 32, 2, 1, 1)
    training = compact_training.Training(compact_training.METHODS[name], settings)
    weight = training.model.layers[1].mlp.w1.weight
    before = weight.detach().clone()
    training.step()
    density = compact_training.METHODS[name].density or 1
    moved = (weight - before).abs() > 1e-5  # Adam's first step moves by lr, 2e-5; weight decay by far less
    assert moved.float().mean() == pytest.approx(density, rel=0.02) and weight.grad is None


def test_clips_by_the_norm_of_the_step(compact_training, monkeypatch):
    settings = compact_training.Settings("gmt_tune.models.tiny.tiny_llama", "fp32", 32, 1, 1, 1)
    training = compact_training.Training(compact_training.METHODS["torch AdamW, fused"], settings)
    norms = []
    training.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in training.model.parameters()]).norm())
    )
    monkeypatch.setattr(compact_training, "CLIP", 0.01)
    training.step()
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
