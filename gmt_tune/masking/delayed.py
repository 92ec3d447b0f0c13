"""Flags of gradients that are not finite, read from an accelerator without making it wait.

The copy to the host starts where the flags are computed, before the optimizer's own kernels are launched, and is read
after they are: by then it has arrived, or does while the device is busy with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gmt_tune.masking.checks import raise_for_flags


class DelayedFlags:
    """Raises for gradients that are not finite: at once where flags are on the CPU, else when it is asked."""

    def __init__(self) -> None:
        self._pending: list[tuple[list[str], str, Tensor, Callable[[], None]]] = []

    def add(self, names: Sequence[str], flags: Sequence[Tensor], where: str) -> None:
        """Take in flags, as ``nonfinite_flags`` gives them.

        Args:
            names: of the gradients.
            flags: one 0-d bool tensor each, on any devices.
            where: what the message says behind the name.

        Raises:
            RuntimeError: if a flag that is not on a CUDA device is set.
        """
        by_device: dict[torch.device, list[int]] = {}
        for i, flag in enumerate(flags):
            by_device.setdefault(flag.device, []).append(i)
        later = [device for device in by_device if device.type == "cuda"]
        now = [i for device, members in by_device.items() if device not in later for i in members]
        raise_for_flags([names[i] for i in now], [flags[i] for i in now], where)
        for device in later:
            members = by_device[device]
            on_host, wait = _start_copy(torch.stack([flags[i] for i in members]))
            self._pending.append(([names[i] for i in members], where, on_host, wait))

    def raise_if_set(self) -> None:
        """Raise RuntimeError if a flag that was taken in since the last call is set; waits for its copy alone."""
        pending, self._pending = self._pending, []
        for names, where, on_host, wait in pending:
            wait()
            raise_for_flags(names, on_host.tolist(), where)


def _start_copy(flags: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy of CUDA flags in pinned memory, and what waits until it is there."""
    on_host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
    on_host.copy_(flags, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(flags.device))
    return on_host, arrived.synchronize
