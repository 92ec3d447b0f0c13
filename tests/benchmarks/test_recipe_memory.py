"""A config run at its size, of a tiny model here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "recipe_memory.py"


@pytest.mark.slow
def test_a_config_is_run_and_its_log_read(tmp_path):
    command = [sys.executable, FILE, "llama3_1/8B_gmt_compact", "--tiny", "--steps", "2", "--folder", tmp_path]
    process = subprocess.run([*command, "--json", tmp_path / "found.json"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["steps"] == 2 and row["status"] == 0 and row["tokens_per_second"] > 0
    assert row["saved_gib"] > 0 and 0 < row["estimated_gib"] < 0.1 and row["alloc_gib"] is None
    assert "| llama3_1/8B_gmt_compact | 2 |" in process.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]  # what was written for it is gone
