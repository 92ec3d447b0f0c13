"""The score ``abs(gradient * weight)`` of one tensor, made where it is read and never held as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gmt_tune.masking.bits import blocks_of_each


class Saliency:
    """Gradient times weight. It stands where a tensor of scores stands.

    Args:
        grad: a gradient.
        weight: of the same shape, on the same device.
    """

    def __init__(self, grad: Tensor, weight: Tensor) -> None:
        self.grad, self.weight = grad.detach(), weight.detach()
        self.dtype = torch.promote_types(grad.dtype, weight.dtype)
        self.device, self.shape, self.layout = grad.device, grad.shape, grad.layout

    def numel(self) -> int:
        return self.grad.numel()

    def read(self, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The scores of some entries: those that ``pick`` takes from a tensor of this shape."""
        return pick(self.grad) * pick(self.weight)

    def blocks(self, size: int) -> Iterator[Tensor]:
        """At most ``size`` scores at a time, in any order and of any shape."""
        for grad, weight in blocks_of_each([self.grad, self.weight], size):
            yield grad * weight
