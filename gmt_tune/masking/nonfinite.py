"""Gradients that are not finite: found without waiting for the device, and raised before they do harm.

On an accelerator, the copy of the flags to the host starts where they are computed, before the optimizer's own kernels
are launched, and is read after they are: by then it has arrived, or does while the device is busy with the step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking import native
from gmt_tune.masking.host import start_copy

# Made once, for hundreds are given out in a step: not to be changed
FLAGS = torch.tensor(False, device="cpu"), torch.tensor(True, device="cpu")


def nonfinite_flags(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor a 0-d bool tensor on its device: whether it holds NaN or infinity. Does not wait."""
    tensors = [t._values() if t.layout == torch.sparse_coo else t.detach() for t in tensors]
    kinds: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        if t.device.type == "cuda" and t.numel():
            kinds.setdefault((t.device, t.dtype), []).append(i)
    flags: dict[int, Tensor] = {}
    for members in kinds.values():  # in a few launches
        largest = torch._foreach_norm([tensors[i] for i in members], math.inf)
        flags.update(zip(members, torch.stack(largest).isfinite().logical_not_().unbind(), strict=True))
    return [flags[i] if i in flags else _is_nonfinite(t) for i, t in enumerate(tensors)]


def _is_nonfinite(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    if (library := native.load_for(tensor)) is not None:
        return FLAGS[library.nonfinite_entries(*native.entries(tensor), torch.get_num_threads())]
    # Elsewhere on the CPU the sum is cheapest. It is not finite if an entry is not; but it can also overflow.
    if tensor.device.type == "cpu" and tensor.dtype != torch.float16 and tensor.sum().isfinite():
        return FLAGS[0]
    return ~torch.stack(tensor.aminmax()).isfinite().all()  # both are NaN if an entry is


def raise_for_flags(names: Sequence[str], flags: Sequence[Any], where: str = "") -> None:
    """Raise if a flag is set; waits for the device.

    Args:
        names: what the message calls each gradient.
        flags: one for each: 0-d bool tensors, or bools.
        where: what the message says behind the name, such as " at optimizer step 3".

    Raises:
        RuntimeError: names the first such gradient, how many others there are, and the way out.
    """
    if flags and all(isinstance(flag, Tensor) for flag in flags):
        flags = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # wait for the device once
    bad = [name for name, flag in zip(names, flags, strict=True) if flag]
    if not bad:
        return
    others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise RuntimeError(
        f"the gradient of '{bad[0]}'{others} holds NaN or infinity{where}: lower the learning rate or clip "
        "gradients, or set error_if_nonfinite to False to let such entries pass through"
    )


class DelayedFlags:
    """Raises for gradients that are not finite: at once where flags are on the CPU, else when it is asked."""

    def __init__(self) -> None:
        self._pending: list[tuple[list[str], str, Tensor, Callable[[], None]]] = []
        self._backward = -1  # the backward pass at whose end they are read

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
            on_host, wait = start_copy(_together([flags[i] for i in members]))
            self._pending.append(([names[i] for i in members], where, on_host, wait))

    def raise_if_set(self) -> None:
        """Raise RuntimeError if a flag that was taken in since the last call is set; waits for its copy alone."""
        pending, self._pending = self._pending, []
        for names, where, on_host, wait in pending:
            wait()
            raise_for_flags(names, on_host.tolist(), where)

    def raise_behind_backward(self) -> None:
        """As :meth:`raise_if_set`; but within a backward pass not now: ``backward()`` raises at its end.

        With the optimizer in backward, the device so gets the steps of all parameters before the host waits for it.
        """
        backward = torch._C._current_graph_task_id()  # as FSDP2 asks for it; -1 outside
        if backward == -1:
            self.raise_if_set()
        elif self._pending and backward != self._backward:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.raise_if_set)


def _together(flags: Sequence[Tensor]) -> Tensor:
    """0-d tensors in one: what they were taken out of, or a copy."""
    base = flags[0]._base
    if base is not None and base.shape == (len(flags),) and all(flag._base is base for flag in flags):
        if all(flag.storage_offset() == i for i, flag in enumerate(flags)):
            return base
    return torch.stack(list(flags))
