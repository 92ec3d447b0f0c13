"""Signals act at once, also on a process that waits in a collective for another one."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gmt_tune.integrations.torchtune.run import signals

# Two processes, of which the second never joins the first one's collective. It ends with the first.
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from gmt_tune.integrations.torchtune.run import signals

out, into = os.pipe()
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
if rank == 1:
    os.close(into)
    os.read(out, 1)
    os._exit(0)
stop = signals.StopSignal()
FIRST
print("waiting", flush=True)
dist.all_reduce(torch.ones(1))
"""
RECEIVED = "SIGTERM received: finishing this step, then saving. A second signal leaves at once.\n"


@pytest.fixture
def start(tmp_path):
    """Function that starts the two processes and comes back when the first is about to wait."""
    started = []

    def start(first: str, arguments: Sequence[Path] = (), **environment: str) -> subprocess.Popen:
        script = SCRIPT.replace("FIRST", first)
        command = [sys.executable, "-c", script, str(tmp_path / f"store{len(started)}"), *map(str, arguments)]
        env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"} | environment
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        started.append(process)
        end = threading.Timer(120, process.kill)  # rather than wait for ever for a line
        end.daemon = True
        end.start()
        assert process.stdout.readline() == "waiting\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def send_and_read(process: subprocess.Popen, number: int) -> str:
    process.send_signal(number)
    assert process.stdout.readline() == "\n"
    return process.stdout.readline()


def test_in_a_collective_the_first_signal_is_reported_and_the_second_one_ends_the_process(start):
    process = start("stop.install()")
    assert send_and_read(process, signal.SIGTERM) == RECEIVED
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


def test_under_torchrun_a_duplicate_of_the_signal_is_ignored_and_a_later_one_ends_the_process(start):
    process = start("signals.DUPLICATE_SIGNAL_WINDOW_S = 1000; stop.install()", TORCHELASTIC_RUN_ID="1")
    assert send_and_read(process, signal.SIGTERM) == RECEIVED
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    process.wait()
    process = start("signals.DUPLICATE_SIGNAL_WINDOW_S = 0; stop.install()", TORCHELASTIC_RUN_ID="1")
    assert send_and_read(process, signal.SIGTERM) == RECEIVED
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_a_process_whose_peer_has_ended_completes_its_checkpoint_and_ends(start, tmp_path):
    writing = tmp_path / "writing"
    writing.touch()
    process = start(
        "signals._NOTICE_S = 0; signals.is_writing = lambda: os.path.exists(sys.argv[2]); stop.install(lambda: [1])",
        arguments=[writing],
    )
    assert send_and_read(process, signal.SIGTERM) == RECEIVED
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    writing.unlink()
    assert "needs the process of rank 1: it has ended" in process.stdout.readline()
    assert process.wait(60) == 128 + signal.SIGTERM


def test_a_process_that_has_saved_no_longer_needs_the_others(start):
    process = start("signals._NOTICE_S = 0; stop.is_saved = True; stop.install(lambda: [1])")
    assert send_and_read(process, signal.SIGTERM) == RECEIVED
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_signal_to_a_child_ends_the_child_and_is_not_one_to_the_run(runs):
    """Nor where an earlier run of the process was left without its cleanup, as in a notebook."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for _ in range(runs):
        stop = signals.StopSignal()
        stop.install()
    try:
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(into, b"forked")
                time.sleep(60)
            finally:
                os._exit(0)
        os.read(out, 6)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert stop.received == 0
        stop.uninstall()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        stop.uninstall()
        signal.signal(signal.SIGTERM, before)


def test_uninstall_gives_the_signals_back():
    given = {number: signal.signal(number, signal.SIG_DFL) for number in signals.SIGNALS}
    given_fd = signal.set_wakeup_fd(-1)
    try:
        stop = signals.StopSignal()
        stop.install()
        assert signal.SIG_DFL not in [signal.getsignal(number) for number in signals.SIGNALS]
        stop.uninstall()
        assert [signal.getsignal(number) for number in signals.SIGNALS] == [signal.SIG_DFL] * len(given)
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.set_wakeup_fd(given_fd)
        for number, handler in given.items():
            signal.signal(number, handler)


def test_a_run_in_another_thread_leaves_the_signals_alone():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    stop = signals.StopSignal()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(stop.install).result()
        pool.submit(stop.uninstall).result()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before and stop.received == 0
