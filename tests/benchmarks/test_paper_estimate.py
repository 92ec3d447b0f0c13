"""The estimates of docs/performance.md: the page holds what the script prints, and the script what the code does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORKER = Path(__file__).with_name("launches_worker.py")


@pytest.fixture(scope="module")
def estimate():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import paper_estimate

        yield paper_estimate
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_page_holds_what_the_script_prints(estimate):
    begin, end = estimate.MARKS
    block = estimate.PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert block.strip() == estimate.page(), "run `python benchmarks/paper_estimate.py --write`"


def test_estimates_are_near_what_was_measured(estimate):
    rows = [line.strip("| ").split(" | ") for line in estimate.beside_measured().splitlines()[2:]]
    assert len(rows) == 7
    for what, paper, measured in rows:  # measured times hold what no estimate has: waiting for the first launch
        assert 0.7 < float(paper) / float(measured) < 1.1, what


def test_work_grows_as_the_page_says(estimate):
    sizes = {f"{i}.w": 1 << 20 for i in range(200)} | {f"{i}.norm": 512 for i in range(50)}
    one, eight, many = (estimate.mask_work(sizes, itemsize=2, dense="*norm*", ranks=n) for n in (1, 8, 64))
    assert one.all_reduces == 0 and eight.sent == many.sent > 0 and eight.launches == many.launches > one.launches
    assert eight.bytes == pytest.approx(8 * many.bytes) and one.bytes < 8 * eight.bytes < 2 * one.bytes
    assert one.device_ms(estimate.H100) > one.floor_ms(estimate.H100)
    sparse, dense = (estimate.compact_work(sizes, d, 20, micro_batches=1) for d in (0.05, 0.2))
    assert sparse.bytes < dense.bytes < 4 * sparse.bytes
    assert estimate.compact_work(sizes, 0.05, 20, micro_batches=8).bytes > 4 * sparse.bytes


@pytest.mark.slow
def test_launches_are_those_of_the_code(estimate, tmp_path):
    """Operations that are dispatched while Triton's interpreter serves: nearly all of them are a launch on a GPU."""
    found = tmp_path / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, WORKER, found], check=True, env=environment, timeout=300)
    counted = json.loads(found.read_text())
    assert len(counted) == 4
    for row in counted:
        sizes = {f"w{i}": 2048 for i in range(row["masked"])} | {f"norm{i}": 64 for i in range(row["dense"])}
        work = estimate.mask_work(sizes, itemsize=2, dense="norm*", ranks=row["ranks"])
        looks = 12 if row["ranks"] == 1 else 0  # at dense gradients: on the CPU they are no operations of PyTorch
        assert abs(row["operations"] - (work.launches - looks)) <= 5, row
        assert row["all_reduces"] == work.all_reduces
