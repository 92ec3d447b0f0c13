"""A process ends with the exit status that it has earned, whatever gloo's threads are still at."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from gmt_tune.integrations.torchtune.process_group import ensure_rendezvous, leave, local_rank, waiting_longer

# What a training leaves to chance, made certain: process 1 waits until process 0 has begun, so that by the end of the
# collective gloo's thread holds the last reference to process 0's tensor, and is busy with it for a second. Something
# else (in a training, DTensor's caches) keeps the group alive, and so its threads.
SCRIPT = """
import sys, threading, time
import torch
import torch.distributed as dist
from gmt_tune.integrations.torchtune.process_group import leave

being_freed = threading.Event()

class Slow(torch.Tensor):
    def __del__(self):
        being_freed.set()
        print(threading.current_thread() is threading.main_thread(), flush=True)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            pass

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
sys._keeps = group = dist.group.WORLD
dist.barrier()
if rank == 1:
    store.wait(["process 0 has begun"])
    dist.all_reduce(torch.ones(8))
else:
    group.allreduce([torch.ones(8).as_subclass(Slow)])
    store.set("process 0 has begun", "1")
    being_freed.wait()
    {leave}
"""


# As a thread that waits for another process and is no daemon
WAITS_FOREVER = """
import threading
process_group._LEAVE_S = 0.5
threading.Thread(target=threading.Event().wait).start()
"""


def first_of_two(tmp_path, how: str) -> subprocess.CompletedProcess:
    """What became of process 0."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(leave=how), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return subprocess.CompletedProcess(processes[0].args, processes[0].returncode, *outputs[0])


@pytest.mark.parametrize(
    "how",
    [
        "leave()",
        pytest.param("leave(has_failed=True)", marks=pytest.mark.slow),  # the last test of two processes fails too
        pytest.param("dist.destroy_process_group(); leave()", marks=pytest.mark.slow),  # as torchtune's cleanup does
    ],
)
def test_gloo_is_done_before_the_interpreter_ends(how, tmp_path):
    process = first_of_two(tmp_path, how)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "False\n"  # the tensor was freed, and not by the main thread


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 no longer ends threads that want the GIL")
def test_destroying_the_group_is_not_enough(tmp_path):
    process = first_of_two(tmp_path, "dist.destroy_process_group()")
    assert process.returncode == -signal.SIGABRT, process.stderr


def test_collectives_wait_longer_for_a_while():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        before = backend.options._timeout
        with waiting_longer(timedelta(hours=7)):
            assert backend.options._timeout == timedelta(hours=7) != before
        assert backend.options._timeout == before
    finally:
        torch.distributed.destroy_process_group()


def test_there_need_be_no_group():
    leave()


def test_the_end_of_another_process_is_seen_and_a_failed_one_ends_without_it(tmp_path):
    script = """
import os, signal, sys
import torch.distributed as dist
from gmt_tune.integrations.torchtune import process_group

child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
ended_ranks = process_group.watch_ranks_here()
if rank == 1:
    signal.pause()
print(ended_ranks())
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(ended_ranks(), flush=True)
{forever}
process_group.leave(has_failed=True)
sys.exit(1)
"""
    for forever in ("", WAITS_FOREVER):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("{forever}", forever), str(tmp_path / f"store{len(forever)}")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == "[]\n[1]\n"
        assert done.returncode == 1, done.stderr


@pytest.fixture
def no_launcher(monkeypatch):
    """An environment in which no torchrun has set anything, given back as it was."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GMT_TUNE_SINGLE_PROCESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_device_of_one_run_is_not_that_of_the_next_in_the_same_process(no_launcher):
    for index, seen in (("1", "1"), ("0", "0"), ("", None), ("2", "2")):
        ensure_rendezvous(index)
        assert os.environ.get("LOCAL_RANK") == seen and local_rank() is None


def test_a_launcher_in_a_process_that_has_trained_by_itself_keeps_its_say(no_launcher, monkeypatch):
    ensure_rendezvous("1")
    check = (
        "import os; from gmt_tune.integrations.torchtune.process_group import ensure_rendezvous, local_rank;"
        "ensure_rendezvous(); print(os.environ['RANK'], os.environ['WORLD_SIZE'], local_rank())"
    )
    launched = {**os.environ, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    done = subprocess.run([sys.executable, "-c", check], env=launched, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["3", "4", "3"], done.stderr


def test_after_a_run_that_failed_the_next_one_in_the_process_can_begin(no_launcher):
    for _ in range(2):
        ensure_rendezvous()
        torch.distributed.init_process_group("gloo")
        leave(has_failed=True)
    assert not torch.distributed.is_initialized()
