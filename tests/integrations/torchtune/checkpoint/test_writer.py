"""Rank 0 sees in a save who still lives; and no thread that writes keeps a process alive for ever."""

import subprocess
import sys
import time
import weakref

import numpy as np
import pytest

from gmt_tune.integrations.torchtune.checkpoint import writer as checkpoint_writer
from gmt_tune.integrations.torchtune.checkpoint.writer import (
    Lookout,
    LostRank,
    Mark,
    Writer,
    attempt,
    has_failed,
    make_marks,
    take_written,
    wait_for_others,
)

RANK = """
import sys, time
from pathlib import Path
from gmt_tune.integrations.torchtune.checkpoint.writer import Mark

def write():
    print("writing", flush=True)
    time.sleep(float(sys.argv[3]))
    return b"what it wrote"

mark = Mark(Path(sys.argv[1]), int(sys.argv[2]))
mark.write(write)
sys.stdin.read()
"""


@pytest.fixture
def rank_process():
    """Function that starts a process that writes as a rank, for some seconds."""
    processes = []

    def start(folder, rank: int, seconds: float) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_rank_0_waits_for_a_rank_that_writes(tmp_path, rank_process, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_LOOK_EVERY_S", 0.05)  # many more looks than a lost rank is given
    make_marks(tmp_path, 2)
    rank_process(tmp_path, 1, 1.5)
    start = time.monotonic()
    wait_for_others(tmp_path)
    assert time.monotonic() - start > 1.0
    assert not has_failed(tmp_path)
    assert take_written(tmp_path) == [b"what it wrote"] and not list(tmp_path.iterdir())


def test_a_rank_that_is_killed_while_it_writes_is_noticed(tmp_path, rank_process):
    make_marks(tmp_path, 4)
    rank_process(tmp_path, 1, 1.0)
    rank_process(tmp_path, 3, 60.0)
    killed = rank_process(tmp_path, 2, 60.0)
    killed.kill()
    killed.wait()
    start = time.monotonic()
    with pytest.raises(LostRank, match="rank 2 ended while it was being written"):
        wait_for_others(tmp_path)
    assert time.monotonic() - start < 20


def test_a_rank_that_is_killed_when_it_has_written_is_noticed_until_it_is_released(tmp_path, rank_process, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_LOOK_EVERY_S", 0.05)
    make_marks(tmp_path, 2)
    waiting = rank_process(tmp_path, 1, 0.0)
    wait_for_others(tmp_path)
    lookout = Lookout(tmp_path)
    for _ in range(3):
        lookout.look()
        time.sleep(0.1)
    waiting.kill()
    waiting.wait()
    with pytest.raises(LostRank, match="rank 1 ended while it was being written"):
        lookout.look()


def test_without_locks_a_rank_that_writes_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "is_locked", lambda file: None)
    monkeypatch.setattr(checkpoint_writer, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(checkpoint_writer, "_LOOKS_UNTIL_STALLED", 20)
    make_marks(tmp_path, 2)
    with pytest.raises(LostRank, match="rank 1 has written nothing for"):
        wait_for_others(tmp_path)


def test_a_rank_that_fails_says_so_and_is_not_lost(tmp_path):
    def fail():
        raise OSError("no room")

    make_marks(tmp_path, 2)
    with pytest.raises(OSError, match="no room"):
        Mark(tmp_path, 1).write(fail)
    wait_for_others(tmp_path)
    assert has_failed(tmp_path)


def test_what_a_writer_raises_is_a_message_for_all_ranks():
    def fail():
        raise OSError(28, "No space left on device")

    def lose():
        raise LostRank("rank 1 ended")

    assert attempt(lambda: 3) == [3, None]
    for write, wanted in (
        (fail, ("OSError: [Errno 28] No space left on device", False)),
        (lose, ("rank 1 ended", True)),
    ):
        writer = Writer(write)
        writer.start()
        writer.wait()
        assert (writer.error, writer.has_lost_rank) == wanted


def test_a_writer_that_is_done_holds_nothing_of_what_it_wrote():
    copy = np.zeros(3)
    held = weakref.ref(copy)
    writer = Writer(lambda copy=copy: copy.sum())
    del copy
    assert held() is not None
    writer.start()
    writer.wait()
    assert held() is None and writer.error is None


LEAVING = """
import sys, time
from pathlib import Path
from gmt_tune.integrations.torchtune.checkpoint import writer as checkpoint_writer
checkpoint_writer._SECONDS_AT_EXIT = {patience}
def write():
    time.sleep({seconds})
    Path(sys.argv[1]).touch()
checkpoint_writer.Writer(write).start()
sys.exit(1)
"""


@pytest.mark.parametrize("seconds, patience, is_written", [(1.0, 30.0, True), (60.0, 0.5, False)])
def test_a_process_that_ends_waits_for_what_it_writes_but_not_for_ever(seconds, patience, is_written, tmp_path):
    script = LEAVING.format(seconds=seconds, patience=patience)
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], timeout=50)
    assert process.returncode == 1 and (tmp_path / "file").exists() == is_written
