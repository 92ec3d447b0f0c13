"""The lock on a run's folder: it keeps other processes out, and goes away with its own however that ends."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import lock as file_lock
from gmt_tune.integrations.torchtune.checkpoint.lock import LOCK_FILE, FileLock, is_locked, lock_folder

# Holds a folder's lock; with an argument, in company of a child that outlives it
HOLDER = """
import os, sys, time
from pathlib import Path
from gmt_tune.integrations.torchtune.checkpoint.lock import lock_folder
lock = lock_folder(Path(sys.argv[1]), print)
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    """Function that lets another process hold a folder's lock."""
    processes = []

    def start(folder, *arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_folder_that_another_process_writes_to_is_refused_until_that_is_killed(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(file_lock, "SECONDS_UNTIL_RELEASED", 0.2)
    holder = hold(tmp_path)
    assert is_locked(tmp_path / LOCK_FILE)
    with pytest.raises(UserError, match=f"another run is writing here .process {holder.pid} on ") as error:
        lock_folder(tmp_path, pytest.fail)
    assert str(tmp_path) in str(error.value) and "choose another output_dir" in str(error.value)
    holder.kill()
    holder.wait()
    lock_folder(tmp_path, pytest.fail).release()
    assert not is_locked(tmp_path / LOCK_FILE)


def test_a_child_of_a_killed_run_does_not_keep_its_lock(tmp_path, hold):
    """Such as a data loader's worker."""
    holder = hold(tmp_path, "with a child")
    holder.kill()
    holder.wait()
    os.killpg(holder.pid, 0)  # raises if the child is gone
    lock_folder(tmp_path, pytest.fail).release()


def test_the_next_run_of_the_same_process_takes_the_lock_over(tmp_path):
    """In a notebook, after a run that ended in an exception."""
    lock_folder(tmp_path, pytest.fail)
    lock_folder(tmp_path / "." / "..", pytest.fail).release()
    lock_folder(tmp_path, pytest.fail).release()


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), OSError(37, "No locks available")], ids=str)
def test_without_locks_a_run_goes_on_and_says_so(error, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise error

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)
    said = []
    assert lock_folder(tmp_path, said.append) is None
    assert len(said) == 1 and "No lock can be taken" in said[0]
    assert is_locked(tmp_path / LOCK_FILE) is None


def test_on_a_full_disk_the_lock_holds_all_the_same(tmp_path, monkeypatch):
    """The file has no room for the note of who holds it; /dev/full says so of every write."""
    (tmp_path / LOCK_FILE).symlink_to("/dev/full")
    lock = lock_folder(tmp_path, pytest.fail)
    assert isinstance(lock, FileLock) and is_locked(tmp_path / LOCK_FILE)
    lock.release()


def test_a_lock_file_that_cannot_be_made_ends_no_run(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()
    said = []
    assert lock_folder(tmp_path, said.append) is None and "Is a directory" in said[0]
