"""Lets a run finish its step and save when a signal asks it to stop."""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

# Signals this close together count as one request to stop: with torchrun's older releases, a terminal's Ctrl-C reaches
# a worker twice, from the terminal and from torchrun, which passes it on.
DUPLICATE_SIGNAL_WINDOW_S = 3.0

# After another process has ended: how long this one may take to notice by itself, and to finish writing a checkpoint.
_NOTICE_S, _WRITE_S = 5.0, 300.0
_LOOK_EVERY_S = 0.2


def is_writing() -> bool:
    """Whether this process is writing its part of a checkpoint."""
    return any(thread.name == "checkpoint-writer" for thread in threading.enumerate())


class StopRun(Exception):
    """The run was asked to stop by a signal and has saved; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """Notes a first SIGTERM, SIGINT or SIGUSR1; a second one ends the process at once.

    Under torchrun, a second one within ``DUPLICATE_SIGNAL_WINDOW_S`` counts as the first.

    A thread acts on the signals: Python calls signal handlers in the main thread alone, and not while that waits in a
    collective. After a signal the thread also looks for processes of the run that have ended. A step cannot be
    finished without them, so it ends this process too, with status 128 + the signal's number; a checkpoint that is
    being written in the background is completed first.

    Attributes:
        received: the signal's number, or 0.
        is_saved: set it when this process no longer needs the others.
    """

    def __init__(self) -> None:
        self.received = 0
        self.is_saved = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._socket: socket.socket | None = None

    def install(self, ended_ranks: Callable[[], list[int]] = lambda: []) -> None:
        """Take over the signals. Only the main thread may: in another one, nothing changes."""
        global _installed
        if threading.current_thread() is not threading.main_thread():
            return
        _uninstall()  # of a run that was left without its cleanup, as in a notebook
        _installed = self
        listening, self._socket = socket.socketpair()
        self._socket.setblocking(False)
        threading.Thread(target=self._listen, args=(listening, ended_ranks), daemon=True).start()
        self._previous_fd = signal.set_wakeup_fd(self._socket.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            # Only for a signal with a handler does Python write its number to the wakeup file descriptor
            self._previous[number] = signal.signal(number, lambda number, frame: None)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        global _installed
        if _installed is not self:
            return
        _installed = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._previous.clear()
        assert self._socket is not None
        self._socket.close()  # which ends the thread

    def _listen(self, listening: socket.socket, ended_ranks: Callable[[], list[int]]) -> None:
        alone_since = None
        with listening:
            while True:
                listening.settimeout(_LOOK_EVERY_S if self.received else None)
                with contextlib.suppress(TimeoutError):
                    numbers = listening.recv(64)
                    if not numbers:
                        return
                    for number in numbers:
                        if number in SIGNALS:
                            self._receive(number)
                if not self.received or self.is_saved or not (ended := ended_ranks()):
                    continue
                now = time.monotonic()
                alone_since = alone_since or now
                if now - alone_since > (_WRITE_S if is_writing() else _NOTICE_S):
                    ranks = ", ".join(map(str, ended))
                    _say(f"Leaving without finishing this step, which needs the process of rank {ranks}: it has ended.")
                    os._exit(128 + self.received)

    def _receive(self, number: int) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            _say(
                f"\n{signal.Signals(number).name} received: finishing this step, then saving. "
                "A second signal leaves at once."
            )
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._since > DUPLICATE_SIGNAL_WINDOW_S:
            # End as the signal does by default. signal.signal() is for the main thread alone
            ctypes.pythonapi.PyOS_setsig(number, None)
            signal.raise_signal(number)
            os._exit(128 + number)  # a container's first process, which signals do not end by default


_installed: StopSignal | None = None  # one at a time has the signals of this process


def _uninstall() -> None:
    if _installed is not None:
        _installed.uninstall()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_uninstall)  # a signal to a child is not one to this process


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
        print(text, flush=True)
