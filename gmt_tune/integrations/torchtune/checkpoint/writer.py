"""Writes a rank's part of a checkpoint in a thread, and lets rank 0 see how far the other ranks are, and who lives.

Each rank but 0 has a mark in the folder that is being written: a file, which it locks, and renames when it is done.
Files rather than a collective show that, since training may be using the collectives.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.checkpoint.lock import FileLock, is_locked

# While rank 0 waits for the others in a save, it looks once a second who still lives and writes.
_LOOK_EVERY_S = 1.0
_LOOKS_UNTIL_LOST = 5  # in a row that found nobody behind a mark; a network file system may show it a little longer
_LOOKS_UNTIL_STALLED = 1800  # in a row in which nothing was written

# How long a process that ends with an error waits for its part of a checkpoint that is being written.
_SECONDS_AT_EXIT = 300.0

# Names, before the rank, of a mark while the rank writes, when it has written, and when it could not.
_WRITING, _WRITTEN, _FAILED = ".writing-by-rank", ".written-by-rank", ".failed-by-rank"


class LostRank(Exception):
    """A rank will not write its part of a checkpoint, nor come to the next collective."""


def attempt(action: Callable) -> list:
    """[result, None], or [None, error message]: what can be sent to the other ranks.

    Raises:
        LostRank: the other ranks cannot be asked to a collective then.
    """
    try:
        return [action(), None]
    except UserError as error:
        return [None, str(error)]
    except LostRank:
        raise
    except Exception as error:  # torch and safetensors raise RuntimeErrors of their own for a full disk
        return [None, one_line(error, with_type=True)]


class Writer(threading.Thread):
    """Writes one rank's part of a checkpoint.

    Attributes:
        error: what went wrong, or None.
        has_lost_rank: whether that is a :class:`LostRank`.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._write = write
        self.error: str | None = None
        self.has_lost_rank = False

    def start(self) -> None:
        """Begin; a process that ends meanwhile waits for it, but not for ever."""
        atexit.register(self.join, _SECONDS_AT_EXIT)
        super().start()

    def run(self) -> None:
        try:
            self.error = attempt(self._write)[1]
        except LostRank as lost:
            self.error, self.has_lost_rank = str(lost), True
        finally:
            del self._write  # with the copy of what it wrote, which is not to wait for the next save

    def wait(self) -> None:
        """Wait until it is done."""
        self.join()
        atexit.unregister(self.join)


def make_marks(folder: Path, world_size: int) -> None:
    """On rank 0: make the marks of the other ranks."""
    for rank in range(1, world_size):
        (folder / f"{_WRITING}{rank}").touch()


class Mark:
    """A rank's mark, locked from now on. Rank 0 has none.

    Args:
        folder: that is being written.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._lock: FileLock | None = None
        if rank > 0:
            with contextlib.suppress(OSError):  # without locks, rank 0 sees only what has been written
                self._lock = FileLock(folder / f"{_WRITING}{rank}")

    def write(self, write: Callable[[], bytes]) -> bytes:
        """Write this rank's part, and let rank 0 see that it has ended; until :meth:`release`, also that it lives.

        Args:
            write: writes it; what it returns is for :func:`take_written`.
        """
        if self._rank == 0:
            return write()
        mark = self._folder / f"{_WRITING}{self._rank}"
        try:
            written = write()
            mark.write_bytes(written)
            mark.rename(self._folder / f"{_WRITTEN}{self._rank}")
        except BaseException:
            mark.rename(self._folder / f"{_FAILED}{self._rank}")  # which needs no room on a full disk
            raise
        return written

    def release(self) -> None:
        """Nobody waits for this rank any longer."""
        if self._lock is not None:
            self._lock.release()


def wait_for_others(folder: Path) -> None:
    """On rank 0: wait until no other rank is writing its part of a checkpoint.

    Raises:
        LostRank: if a rank has ended without a word, or nothing has been written for half an hour.
    """
    looks_lost: dict[Path, int] = {}
    looks_stalled, written, next_look = 0, -1, time.monotonic()
    while marks := sorted(folder.glob(f"{_WRITING}*")):
        if time.monotonic() >= next_look:
            looks_lost = {mark: looks_lost.get(mark, 0) + 1 for mark in marks if is_locked(mark) is False}
            _raise_if_lost([mark for mark, looks in looks_lost.items() if looks > _LOOKS_UNTIL_LOST])
            before, written = written, sum(map(_size, folder.glob("*/*.distcp")))
            looks_stalled = looks_stalled + 1 if written == before else 0
            if looks_stalled > _LOOKS_UNTIL_STALLED:
                waiting = ", ".join(mark.name.removeprefix(_WRITING) for mark in marks)
                raise LostRank(f"rank {waiting} has written nothing for {_LOOKS_UNTIL_STALLED * _LOOK_EVERY_S:.0f} s")
            next_look = time.monotonic() + _LOOK_EVERY_S
        time.sleep(0.01)


class Lookout:
    """On rank 0, when the others have written their parts: sees who of them still lives, as :meth:`look` is called.

    Args:
        folder: that is being written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._next_look = folder, time.monotonic()

    def look(self) -> None:
        """Return at once if all live.

        Raises:
            LostRank: if a rank has ended.
        """
        if time.monotonic() < self._next_look:
            return
        for _ in range(_LOOKS_UNTIL_LOST):
            lost = [mark for mark in sorted(self._folder.glob(f"{_WRITTEN}*")) if is_locked(mark) is False]
            self._next_look = time.monotonic() + _LOOK_EVERY_S
            if not lost:
                return
            time.sleep(_LOOK_EVERY_S)
        _raise_if_lost(lost)


def _raise_if_lost(marks: list[Path]) -> None:
    if marks:
        ranks = ", ".join(mark.name.removeprefix(_WRITING).removeprefix(_WRITTEN) for mark in marks)
        raise LostRank(f"rank {ranks} ended while it was being written")


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):  # a rank that fails removes its file
        return file.stat().st_size
    return 0


def has_failed(folder: Path) -> bool:
    """On rank 0, when no other rank is writing: whether one could not, which says why."""
    return any(folder.glob(f"{_FAILED}*"))


def take_written(folder: Path) -> list[bytes]:
    """On rank 0, when no other rank is writing and none has failed: what each said of its part."""
    marks = list(folder.glob(f"{_WRITTEN}*"))
    written = [mark.read_bytes() for mark in marks]
    for mark in marks:
        mark.unlink()
    return written
