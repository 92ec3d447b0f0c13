"""What the host reads of numbers on a device: in one transfer for all, or later, when a copy has arrived by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def start_copy(values: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy of a tensor on the host, and what waits until it is there.

    Of a CUDA tensor, the copy is in pinned memory and is started without waiting; of any other, it is there at once.
    """
    if not values.is_cuda:
        return values.detach().cpu(), lambda: None
    on_host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))
    return on_host, arrived.synchronize


def together(numbers: Sequence[Tensor], device: torch.device) -> Tensor:
    """0-d tensors of any dtypes and devices in one, [n], fp64, on a device: exact up to whole numbers of 2**53."""
    groups: dict[tuple, list[int]] = {}
    for i, number in enumerate(numbers):
        groups.setdefault((number.device, number.dtype), []).append(i)
    parts = [
        torch.stack([numbers[i].detach() for i in members]).to(device, torch.float64) for members in groups.values()
    ]
    if len(parts) == 1:
        return parts[0]
    order = [i for members in groups.values() for i in members]
    places = {i: place for place, i in enumerate(order)}
    joined = torch.cat(parts).unbind()
    return torch.stack([joined[places[i]] for i in range(len(numbers))])


def to_host(numbers: Sequence[Tensor]) -> list[Any]:
    """The values of 0-d tensors, floats, in one transfer per device; waits for each."""
    by_device: dict[torch.device, list[int]] = {}
    for i, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(i)
    values: list[float] = [0.0] * len(numbers)
    for device, members in by_device.items():
        read = together([numbers[i] for i in members], device).tolist()
        for i, value in zip(members, read, strict=True):
            values[i] = value
    return values
