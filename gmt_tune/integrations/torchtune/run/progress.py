"""What a person sees while a run trains: a bar on a terminal, one plain line per logged step elsewhere."""

import os
import sys
import time

from tqdm import tqdm


class Progress:
    """Progress of one epoch, from 1 on, shown by one rank; without a terminal, a line ``every`` so many steps."""

    def __init__(self, epoch: int, total: int, done: int, every: int, is_shown: bool) -> None:
        self._epoch, self._total, self._done, self._every = epoch, total, done, every
        self._start, self._done_before = time.perf_counter(), done
        self._is_shown = is_shown
        self._bar = None
        if is_shown and sys.stderr.isatty():
            # A terminal of unknown width (0), such as a container's, would get an empty bar
            has_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            width = {"dynamic_ncols": True} if has_width else {"ncols": 100}
            self._bar = tqdm(total=total, initial=done, unit="step", **width)
        self._val_loss: float | None = None

    def is_line_due(self) -> bool:
        """Whether the next :meth:`update` shows a line, where there is no terminal; the same on all ranks."""
        return (self._done + 1) % self._every == 0 or self._done + 1 == self._total

    def update(
        self, global_step: int, loss: float | None, tokens_per_second: float | None, mask_share: float | None
    ) -> None:
        """Show one more optimizer step, with the last numbers that are known.

        ``mask_share`` is the part of the step's time that the mask took.
        """
        is_line_due = self.is_line_due()
        self._done += 1
        if not self._is_shown:
            return
        numbers = {}
        if loss is not None:
            numbers["loss"] = f"{loss:.4f}"
        if self._val_loss is not None:
            numbers["val_loss"] = f"{self._val_loss:.4f}"
        if tokens_per_second is not None:
            numbers["tokens_per_second"] = f"{tokens_per_second:.0f}"
        if mask_share is not None:
            numbers["mask_share"] = f"{mask_share:.1%}"
        if self._bar is not None:
            self._bar.set_description(f"epoch {self._epoch} step {global_step}", refresh=False)
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(1)
        elif is_line_due:
            seconds = (time.perf_counter() - self._start) / (self._done - self._done_before)
            numbers["time_left"] = tqdm.format_interval(seconds * (self._total - self._done))
            text = " ".join(f"{key}={value}" for key, value in numbers.items())
            _print(f"epoch={self._epoch} step={self._done}/{self._total} {text}")

    def show_validation(self, val_loss: float) -> None:
        """Show a validation loss with the steps from now on."""
        self._val_loss = val_loss
        if self._is_shown and self._bar is None:
            _print(f"epoch={self._epoch} step={self._done}/{self._total} val_loss={val_loss:.4f}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _print(line: str) -> None:
    """Print a line. Where it does not fit, in a file on a full disk, training goes on without it."""
    try:
        print(line, flush=True)
    except BrokenPipeError:  # nobody reads any more
        raise
    except OSError:
        pass
