"""What Triton's kernels would find in gradients without values, where the sizes of memory follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gmt_tune.masking.scores import entries_to_keep
from gmt_tune.memory.simulation.gpu import SimulatedGPU


class _Counts:
    """In place of a tensor on the device: how many entries are above each threshold, and at it."""

    def __init__(self, gpu: SimulatedGPU, above: Sequence[int]) -> None:
        self._gpu, self._above = gpu, above

    def tolist(self) -> list[list[int]]:
        self._gpu.read("tolist")
        return [list(self._above), [0] * len(self._above)]


def patches(gpu: SimulatedGPU, density: float) -> Iterator[tuple[Any, str, Any]]:
    """What to put in place of which attributes, so that selections have the share of entries that a mask asks for."""
    try:
        from gmt_tune.masking.search import triton
    except ImportError:  # without Triton there are no kernels
        return
    by_kind, count = triton._thresholds_by_kind, triton.count_by_segment
    sizes: list[int] = []  # of the tensors that are counted next

    def thresholds_by_kind(grads: Sequence[Any], *args: Any) -> Iterator[tuple]:
        for members, *rest in by_kind(grads, *args):
            sizes[:] = [grads[i].numel() for i in members]
            yield members, *rest

    def count_by_segment(*args: Any) -> tuple[Any, _Counts]:
        sums, _ = count(*args)
        return sums, _Counts(gpu, [entries_to_keep(size, density) for size in sizes])

    yield triton, "_thresholds_by_kind", thresholds_by_kind
    yield triton, "count_by_segment", count_by_segment
