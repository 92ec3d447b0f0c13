"""Lets a run finish its step and save when it is told to stop."""

import os
import signal
import time
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# With torchrun's older releases, a terminal's Ctrl-C reaches a worker twice: from the terminal, and passed on by
# torchrun. That is one wish to stop.
SECONDS_OF_ONE_WISH = 3.0


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopSignal:
    """Notes a first SIGTERM, SIGINT or SIGUSR1; a second one ends the process at once.

    Under torchrun, a second one within ``SECONDS_OF_ONE_WISH`` is taken for the first.

    Attributes:
        received: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._has_told = False
        self._second = 0  # a signal that came while the first was being told
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; only the main thread may."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            print(
                f"\n{signal.Signals(number).name} received: finishing this step, then saving. "
                "A second signal leaves at once.",
                flush=True,
            )
            self._has_told = True
            if self._second:
                self._leave(self._second)
        elif not _is_under_torchrun() or time.monotonic() - self._since > SECONDS_OF_ONE_WISH:
            if self._has_told or self._second:
                self._leave(number)
            self._second = number

    @staticmethod
    def _leave(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
