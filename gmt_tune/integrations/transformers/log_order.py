"""Who gets which of the mask's numbers: reporters and the user's callbacks all, the printed line and the history few.

A Trainer hands one dict of logs from callback to callback: first to its reporters (TensorBoard, W&B, ...), then to the
user's callbacks, last to the one that prints or shows a progress bar. So all numbers are added by the first callback,
and those that only reporters want are taken out again right before what prints.
"""

import sys
from collections.abc import Iterable
from typing import TypeVar

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

Caller = TypeVar("Caller")
_PRINTERS = (PrinterCallback, ProgressCallback)


class ShortLine(TrainerCallback):
    """Takes numbers out of a log before it is printed. Changes no other log."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()

    def leave_out(self, names: Iterable[str]) -> None:
        """The names to take out of the log that is being handed on."""
        self._names = tuple(names)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in self._names:
            logs.pop(name, None)
        self._names = ()


def arrange(handler: CallbackHandler, first: TrainerCallback, short_line: ShortLine) -> None:
    """Put one callback before all others, and ``short_line`` behind all but what prints, which comes last."""
    others = [callback for callback in handler.callbacks if callback is not first and callback is not short_line]
    printers = [callback for callback in others if isinstance(callback, _PRINTERS)]
    others = [callback for callback in others if not isinstance(callback, _PRINTERS)]
    # A new list: the handler may be going through the old one
    handler.callbacks = [first, *others, short_line, *printers]


def calling(kind: type[Caller]) -> Caller | None:
    """The Trainer or the CallbackHandler in one of whose methods this runs; None if there is none.

    Events get everything but these two. So they are looked up where they must be: among the calling frames.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        frame = frame.f_back
    return None
