"""What entries are ranked by, to be read in blocks or sampled: tensors of any shape, stride and dtype, or products."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gmt_tune.masking.bits import blocks, blocks_of_each, flat_view

RUN = 4  # a sample is taken in runs of so many neighbours: cheaper than one by one, and nearly as random


class Product:
    """Gradient times weight, multiplied where it is read and never held as a whole. Stands where a tensor stands.

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
        """The product of the entries that ``pick`` takes of a tensor."""
        return pick(self.grad) * pick(self.weight)

    def blocks(self, size: int) -> Iterator[Tensor]:
        """At most ``size`` entries at a time."""
        return (grad * weight for grad, weight in blocks_of_each([self.grad, self.weight], size))


def read_blocks(member: Tensor | Product, size: int) -> Iterator[Tensor]:
    """At most ``size`` entries at a time, in any order."""
    return member.blocks(size) if isinstance(member, Product) else blocks(member, size)


class Entries:
    """Tensors or products as one set of entries of one dtype: theirs, or float32 where they differ."""

    def __init__(self, members: Sequence[Tensor | Product]) -> None:
        self.dtype = members[0].dtype
        if any(m.dtype != self.dtype for m in members):
            self.dtype = torch.float32
        self.numel = sum(m.numel() for m in members)
        self._members = [_flat(m) for m in members]

    @property
    def only(self) -> Tensor | None:
        """The tensor, where these are those of one."""
        (member, *others) = self._members
        return member if isinstance(member, Tensor) and not others else None

    def blocks(self, size: int) -> Iterator[Tensor]:
        """At most ``size`` entries at a time; 1-d where memory has no gaps."""
        for member in self._members:
            parts: Iterable[Tensor] = read_blocks(member, size)
            if isinstance(member, Tensor) and member.numel() <= size:
                parts = (member,)
            for part in parts:
                yield part.to(self.dtype)

    def sample(self, size: int) -> Tensor:
        """All entries, or about ``size`` random ones where there are more, 1-d; always the same positions."""
        parts = []
        for member in self._members:
            n, m = member.numel(), max(RUN, size * member.numel() // self.numel)
            if n <= m:
                pick = _all
            elif len(member.shape) == 1:
                pick = functools.partial(_runs, index=_positions(n // RUN, m // RUN))
            else:
                index = torch.unravel_index(_positions(n, m), member.shape)
                pick = functools.partial(_at, index=index)
            parts.append(_read(member, pick).to(self.dtype))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _flat(member: Tensor | Product) -> Tensor | Product:
    """The same entries in one dimension where no copy is needed for it."""
    if isinstance(member, Product):
        is_flat = member.grad.is_contiguous() and member.weight.is_contiguous()
        return Product(member.grad.view(-1), member.weight.view(-1)) if is_flat else member
    return flat if (flat := flat_view(member)) is not None else member.detach()


def _read(member: Tensor | Product, pick: Callable[[Tensor], Tensor]) -> Tensor:
    return member.read(pick) if isinstance(member, Product) else pick(member)


def _all(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _runs(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor[: tensor.numel() // RUN * RUN].view(-1, RUN).index_select(0, index).view(-1)


def _at(tensor: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    return tensor[index]


@functools.lru_cache(maxsize=16)
def _positions(n: int, m: int) -> Tensor:
    """m random positions below n, in ascending order, one in each of m equal parts; always the same ones."""
    generator = torch.Generator().manual_seed(n)
    within = torch.rand(m, dtype=torch.float64, generator=generator, device="cpu")
    parts = torch.arange(m, dtype=torch.float64, device="cpu") + within
    return (parts * (n / m)).to(torch.int64).clamp_(max=n - 1)
