"""Keeps torchrun's own traceback from burying what a recipe has said.

When a rank ends with an error or by a signal, torchrun raises in the launching process, ``tune`` here. Its long
traceback says nothing of the cause, which the rank has printed already.
"""

import os
import sys

# What torchrun raises when a rank has failed, and when it receives a signal itself.
_RAISED = {
    "ChildFailedError": "a process of the run ended with an error or was asked to stop: its own message is above",
    "SignalException": "the run was asked to stop: what it saved is said above",
}


def shorten_tracebacks() -> None:
    """In this process, show one line instead of torchrun's traceback; ``GMT_TUNE_DEBUG=1`` shows it all the same."""
    show = sys.excepthook

    def show_in_short(kind, error, traceback) -> None:
        message = _RAISED.get(kind.__name__) if kind.__module__.startswith("torch.distributed.elastic") else None
        if message is None or os.environ.get("GMT_TUNE_DEBUG") == "1":
            show(kind, error, traceback)
        else:
            print(f"tune: {message}", file=sys.stderr)

    sys.excepthook = show_in_short
