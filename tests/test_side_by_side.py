"""examples/side_by_side.py: four methods in one plain loop, a table and a figure."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "side_by_side.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("side_by_side", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_steps_of_each_method_and_their_figure(example, tmp_path, capsys):
    results = example.main(["--steps", "2", "--every", "1", "--asked", "2", "--output", str(tmp_path / "figure.svg")])
    assert list(results) == ["SFT", "GMT", "GMT compact", "LoRA"]
    assert all(r["steps"] == [0, 1, 2] and r["loss"][2] < r["loss"][0] for r in results.values())
    assert len({r["loss"][0] for r in results.values()}) == 1, "they do not begin at the same weights"
    sizes = {method: r["state"] for method, r in results.items()}
    assert sizes["SFT"] == sizes["GMT"] > 2 * sizes["GMT compact"] and sizes["SFT"] > 4 * sizes["LoRA"]
    out = capsys.readouterr().out
    assert all(f"| {method} | " in out for method in results)
    assert "GMT compact" in (tmp_path / "figure.svg").read_text()


@pytest.mark.slow
def test_the_compact_optimizer_learns_the_task(example):
    results = example.main(["--methods", "SFT", "GMT compact"])
    assert results["GMT compact"]["accuracy"][-1] > 0.95 > results["SFT"]["accuracy"][-1]
    assert results["GMT compact"]["moved"] < 0.9
