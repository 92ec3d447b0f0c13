"""What these tests simulate: parameters with gradients on the device, and what each optimizer step asks of it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SHAPES = [(1 << 17,), (513, 257), (64, 3, 5), (1,)]


@dataclass
class Step:
    """What one step asked of the device."""

    reads: Counter
    late_reads: Counter
    launches: Counter

    @property
    def launched(self) -> int:
        return sum(self.launches.values())


def parameters(
    times: int = 1, dtype: torch.dtype = torch.bfloat16, place: Callable[[Tensor], Tensor] = lambda t: t
) -> dict[str, nn.Parameter]:
    """So many times one parameter of each shape; ``place`` makes a DTensor of it, for example."""
    shapes = [shape for _ in range(times) for shape in SHAPES]
    return {f"p{i}": nn.Parameter(place(torch.empty(s, dtype=dtype, device="cuda"))) for i, s in enumerate(shapes)}


def set_gradients(held: Iterable[nn.Parameter]) -> None:
    for p in held:
        p.grad = torch.empty_like(p.detach())  # with its strides


def run(gpu, held: Iterable[nn.Parameter], step: Callable[[], object], times: int = 4) -> list[Step]:
    """Take steps with new gradients, of which the first is not counted: it makes states and constants."""
    found = []
    for _ in range(times + 1):
        set_gradients(held)
        gpu.reset()
        step()
        found.append(Step(Counter(gpu.reads), Counter(gpu.late_reads), Counter(gpu.launches)))
    return found[1:]


@contextlib.contextmanager
def simulated_devices() -> Iterator[Callable[[int], tuple]]:
    """Gives a function that simulates so many devices, and returns the first with the mesh of all."""
    from torch.distributed.device_mesh import init_device_mesh

    from gmt_tune.memory.simulation.gpu import SimulatedGPU, without_simulation
    from gmt_tune.memory.simulation.recipe import simulated_ranks

    with contextlib.ExitStack() as stack:

        def begin(number: int) -> tuple:
            gpu = stack.enter_context(SimulatedGPU(number))
            stack.enter_context(simulated_ranks(number))
            return gpu, without_simulation(init_device_mesh)("cuda", (number,))

        yield begin
