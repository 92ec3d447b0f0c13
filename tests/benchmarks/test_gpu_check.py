"""The check on a GPU: what it found there can be read, and its parts begin on the CPU too."""

import gzip
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, BENCHMARKS / "gpu_check.py", *arguments], capture_output=True, text=True)


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("gpu_*.jsonl")), ids=lambda file: file.name)
def test_results_are_shown_as_tables(file, gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--show", str(file)])
    gpu_check.main()
    shown = capsys.readouterr().out
    for line in file.read_text().splitlines():
        assert f"\n{json.loads(line)['part']}: " in shown


@pytest.mark.slow
def test_a_part_is_rehearsed_on_the_cpu(tmp_path):
    process = run("--rehearse", "--part", "sharded", "--out", tmp_path)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    (line,) = read_lines(tmp_path)
    assert line["part"] == "sharded" and line["status"] == 0
    assert [row["equal"] for row in line["found"]] == [True]


def test_an_unknown_part_is_refused(tmp_path):
    process = run("--rehearse", "--part", "shards", "--out", tmp_path)
    assert process.returncode != 0 and "no part 'shards': there are device, " in process.stderr


def test_parts_that_have_no_time_left_are_named(tmp_path):
    process = run("--rehearse", "--minutes", "0.1", "--part", "device", "--part", "quality", "--out", tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert [(line["part"], line["status"]) for line in read_lines(tmp_path)] == [
        ("device", "no time left"),
        ("quality", "no time left"),
    ]
    assert "2 parts had no time left: ['device', 'quality']" in process.stdout


def test_a_part_says_why_a_small_device_cannot_run_it(gpu_check, tmp_path):
    parts = gpu_check.parts_of("cuda", False, tmp_path, tmp_path)
    there = {name: gpu_check.left_out(part, 22.5) for name, part in parts.items()}
    assert there["8b, single device"] == "left out: it needs 52 GiB of device memory, and this device has 22.5"
    assert there["8b, compact, on a card of 24 gb"] is None and there["tests of the mask"] is None
    assert not any(gpu_check.left_out(part, 79.2) for part in parts.values())  # an H100 runs all


def test_the_default_ten_minutes_reach_the_configs_at_full_size(gpu_check, tmp_path):
    parts = gpu_check.parts_of("cuda", False, tmp_path, tmp_path)
    names = list(parts)
    first = names[: names.index("8b, low memory")]
    seconds = [part.seconds for name, part in parts.items() if name in first and not name.startswith("tests")]
    assert sum(seconds) + max(parts[name].seconds for name in first if name.startswith("tests")) <= 600
    assert names[-1] == "quality" and parts["quality"].goes_on  # takes what is left


def test_a_part_is_ended_after_its_time(gpu_check, tmp_path):
    endless = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    start = time.monotonic()
    lines = [
        gpu_check.run_part(gpu_check.Part(60, endless, tmp_path / "none", goes_on=goes_on), 1)
        for goes_on in (False, True)
    ]
    assert time.monotonic() - start < 30
    assert [line["status"] for line in lines] == ["out of time", 0] and "begun" in lines[0]["output"]


def test_what_a_part_leaves_has_no_paths_of_this_run(gpu_check, tmp_path):
    file = tmp_path / "found.json"
    command = "python x.py --model-folder /tmp/abc/8b --json /tmp/abc/x.json"
    file.write_text(json.dumps({"environment": {"command": command}}))
    line = gpu_check.run_part(gpu_check.Part(60, ["true"], file), 60)
    assert line["found"] == {"environment": {"command": "python x.py"}} and line["status"] == 0
    assert gpu_check.run_part(gpu_check.Part(60, ["false"], file), 60)["status"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kill and resume", "smollm2 beside torchtune's recipe", "profile", "quality"])
def test_a_longer_part_is_rehearsed_on_the_cpu(part, tmp_path):
    process = run("--rehearse", "--part", part, "--out", tmp_path)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    (line,) = read_lines(tmp_path)
    assert line["part"] == part and line["status"] == 0
    if part == "kill and resume":
        assert [(row["kind"], row["equal"]) for row in line["found"]] == [("compact", True)]
    elif part == "profile":
        assert [row["step"] for row in line["found"]] == ["masked", "compact"]
        for step in ("masked", "compact"):
            trace = json.loads(gzip.decompress((tmp_path / f"smollm2_135m_{step}_step.json.gz").read_bytes()))
            assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    elif part == "quality":
        assert [row["run"] for row in line["found"]] == [
            "village_small/base/measure_lr0_seed0",
            "village_small/sft/measure_lr0.002_seed0",
        ]
        assert (tmp_path / "quality" / "village_small.jsonl").is_file()
    else:
        recipes = [row["recipe"] for row in line["found"]["rows"]]
        assert recipes == ["full_finetune_single_device", "gmt_full_finetune", "gmt_full_finetune"]
        assert "torchtune's recipe | 3 |" in process.stdout
