"""The benchmark of compact steps: it takes the steps that it times, and writes what it prints."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPES = {"embedding": (2000, 96), "0.q": (96, 96), "1.q": (96, 96), "norm": (96,)}


@pytest.fixture(scope="module")
def compact():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import compact

        yield compact
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_measures_and_writes_what_it_prints(compact, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compact.MODELS, "smollm2_135m", SHAPES)
    monkeypatch.setattr(compact, "METHODS", {name: m for name, m in compact.METHODS.items() if "torchao" not in name})
    compact.measure("smollm2_135m", "bf16", list(compact.METHODS), 0.05, 3, 1)  # makes tables that stay
    path = tmp_path / "numbers.json"
    compact.main(["--dtype", "bf16", "--rounds", "2", "--refresh-every", "3", "--json", str(path)])
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["torch AdamW, fused", "compact, 32 bits", "compact, 8 bits"]
    assert rows["compact, 32 bits"]["beside"] == "torch AdamW, fused" and rows["compact, 32 bits"]["ratio"] > 0
    printed = capsys.readouterr().out
    for row in rows.values():
        assert row["entries"] == 2000 * 96 + 2 * 96 * 96 + 96
        assert f"| {row['median_ms']:.4g} |" in printed
    assert rows["torch AdamW, fused"]["kept_bytes_per_entry"] == pytest.approx(4, rel=0.05)  # two moments in bf16
    # Two moments, an age and a place of each of a twentieth
    assert rows["compact, 32 bits"]["kept_bytes_per_entry"] == pytest.approx(0.05 * 12, rel=0.05)
    assert rows["compact, 8 bits"]["kept_bytes_per_entry"] < rows["compact, 32 bits"]["kept_bytes_per_entry"]


def test_compact_steps_are_those_of_a_backward_pass(compact):
    torch.manual_seed(0)
    given = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    weights = {}
    for is_benchmark in (True, False):
        parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
        steps = compact.compact(parameters, 0.05, 2, 32)
        for _ in range(3):
            if is_benchmark:
                steps.step(given)
            else:
                sum((p * given[name]).sum() for name, p in parameters.items()).backward()
                steps.optimizer.step()
                steps.optimizer.zero_grad()
        weights[is_benchmark] = torch.cat([p.detach().view(-1) for p in parameters.values()])
    assert torch.equal(*weights.values()) and 0.04 < (weights[True] != 1).float().mean() < 0.06
