"""Locks on files that the kernel releases when their process ends, however it ends.

They show that a run is writing to a folder, and that a process is still alive. Where a file system knows no locks,
taking one raises an OSError other than BlockingIOError, and nothing can be seen. Of the package ``filelock``, many
releases empty a file before they have its lock and keep it in forked children, and without flock a newer one leaves a
file behind that outlives a kill.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from gmt_tune.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# A run that was just asked to stop may hold its lock for a moment more.
SECONDS_UNTIL_RELEASED = 3.0

LOCK_FILE = ".gmt_tune.lock"

# Locks of this process by folder. A run that ends in an exception keeps its own: the next one here takes it over.
_LOCKED: dict[str, FileLock] = {}


class FileLock:
    """An exclusive lock, held until :meth:`release`, or until this process has ended.

    Args:
        file: made if it does not exist; it stays.
        flags: that the file is opened with.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system knows no locks, or the file cannot be made.
    """

    _held: set[FileLock] = set()

    def __init__(self, file: Path, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        if fcntl is None:
            raise OSError("this system has no flock")
        try:
            self._descriptor = os.open(file, flags, 0o666)
        except PermissionError:  # the file of another user: reading is enough for a lock
            self._descriptor = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._held.add(self)

    def write(self, text: str) -> None:
        """Put a text into the file, for those who find it locked; where there is room for it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Let others take it. Safe to call again."""
        if self in self._held:
            self._held.discard(self)
            os.close(self._descriptor)

    @classmethod
    def _release_in_child(cls) -> None:
        # A lock belongs to whoever has its file open: a child would keep it when this process is gone
        for lock in list(cls._held):
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FileLock._release_in_child)


def is_locked(file: Path) -> bool | None:
    """Whether a process holds the lock of a file; None where that cannot be seen, or the file does not exist."""
    try:
        FileLock(file, os.O_RDWR).release()
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def lock_folder(folder: Path, report: Callable[[str], None]) -> FileLock | None:
    """The lock of a run's ``output_dir``, with a note of who holds it; None where the file system knows no locks.

    Args:
        folder: exists.
        report: called with one sentence where there is no lock.

    Raises:
        UserError: if another process holds it.
    """
    file = folder / LOCK_FILE
    if (earlier := _LOCKED.pop(os.path.realpath(folder), None)) is not None:
        earlier.release()
    deadline = time.monotonic() + SECONDS_UNTIL_RELEASED
    while True:
        try:
            lock = FileLock(file)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = "its process is not known"
                with contextlib.suppress(OSError, IndexError):
                    holder = file.read_text(errors="replace").splitlines()[0][:200]
                raise UserError(
                    f"output_dir {folder}: another run is writing here ({holder}): wait until it has ended, or choose "
                    "another output_dir"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            report(f"No lock can be taken in {folder} ({error}): take care that no other run writes there.")
            return None
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    _LOCKED[os.path.realpath(folder)] = lock
    return lock
