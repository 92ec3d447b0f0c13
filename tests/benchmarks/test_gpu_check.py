"""The check on a GPU: what it found there can be read, and its parts begin on the CPU too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, BENCHMARKS / "gpu_check.py", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("gpu_*.jsonl")), ids=lambda file: file.name)
def test_results_are_shown_as_tables(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    process = run("--show", file)
    assert process.returncode == 0, process.stderr
    for line in lines:
        assert f"\n{line['part']}: " in process.stdout


def test_a_part_is_rehearsed_on_the_cpu(tmp_path):
    process = run("--rehearse", "--part", "sharded", "--out", tmp_path)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    (line,) = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert line["part"] == "sharded" and line["status"] == 0
    assert [row["equal"] for row in line["found"]] == [True]


def test_an_unknown_part_is_refused(tmp_path):
    process = run("--rehearse", "--part", "shards", "--out", tmp_path)
    assert process.returncode != 0 and "no part 'shards': there are device, " in process.stderr
