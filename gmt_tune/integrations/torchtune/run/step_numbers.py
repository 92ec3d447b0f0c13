"""What the host learns of optimizer steps: on CUDA behind the next step, so that it does not wait for the device."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gmt_tune.masking.host import start_copy, together


@dataclass(frozen=True)
class _OnTheWay:
    names: tuple[str, ...]
    on_host: Tensor
    wait: Callable[[], None]
    origin: Any


class StepNumbers:
    """Numbers of steps, in the steps' order, each step's in one transfer that is started without waiting."""

    def __init__(self) -> None:
        self._sent: list[_OnTheWay] = []

    def send(self, numbers: Mapping[str, Tensor], origin: Any = None) -> None:
        """Start to copy a step's numbers, by name and 0-d, to the host; ``origin`` comes back with them."""
        values = list(numbers.values())
        on_host, wait = start_copy(together(values, values[0].device))
        self._sent.append(_OnTheWay(tuple(numbers), on_host, wait, origin))

    def receive(self, *, with_last: bool) -> Iterator[tuple[dict[str, float], Any]]:
        """The numbers of steps that were not received yet, with their origins.

        With the last step's, it waits for all that the device has to do. Without, only for the step before that one:
        while the host waits, the device has the last step to work on.
        """
        left = [] if with_last else self._sent[-1:]
        arriving, self._sent = self._sent[: len(self._sent) - len(left)], left
        if arriving:
            arriving[-1].wait()  # those before it have arrived then
        for step in arriving:
            yield dict(zip(step.names, step.on_host.tolist(), strict=True)), step.origin
