"""A selection as a value: which of a part's entries stay, made from thresholds, a draw, or bits that were kept.

Measuring (``scores``, ``search``) makes selections and changes nothing; :func:`apply_` zeroes what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking import native
from gmt_tune.masking.bits import (
    INFINITY_BITS,
    INT_DTYPE,
    MAGNITUDE_MASK,
    bits_to_float,
    blocks_of_each,
    magnitude_bits,
    smallest_selected_bits,
)
from gmt_tune.masking.draws import CHUNK, ROUNDS, apply_random_, last_drawn, random_selection, signed
from gmt_tune.masking.packing import apply_packed_, pack_selection, unpack_selection
from gmt_tune.masking.parts import Part, sum_counts
from gmt_tune.masking.places import Places
from gmt_tune.masking.search.devices import is_served, kernels_for, try_triton
from gmt_tune.masking.search.entries import Product

__all__ = ["PackedSelection", "PlacedSelection", "Selection", "apply_"]

_BLOCK = {"cpu": 1 << 17, "other": 1 << 21}  # entries compared at a time: bounds the passing memory


class Selection:
    """Which of the entries that this process holds of a gradient are selected; see the subclasses.

    Attributes:
        threshold: the smallest selected score, a 0-d tensor, where entries were ranked.
        count: how many entries of the whole gradient are selected, 0-d int64, where it is known before it is applied.
        nonfinite: 0-d bool tensor: whether the gradient holds NaN or infinity, where it was seen on the way.
        outlasts_step: whether it must be kept to be used in another step; what is drawn can be drawn once more.
    """

    threshold: Tensor | None = None
    count: Tensor | None = None
    nonfinite: Tensor | None = None
    outlasts_step = True

    def mask(self) -> Tensor:
        """Bool tensor of the shape of the part's entries."""
        raise NotImplementedError

    def apply_(self, grad: Tensor) -> Tensor:
        """Zero, in place, the entries of the part that are not selected; returns how many are, 0-d int64."""
        kept = self.mask()
        grad.masked_fill_(~kept, 0)
        return kept.sum()

    def suits(self, kernels: ModuleType, grad: Tensor) -> bool:
        """Whether Triton's kernels can apply it to a gradient, which has entries."""
        return False

    @staticmethod
    def apply_together_(kernels: ModuleType, grads: Sequence[Tensor], selections: Sequence[Any]) -> list[Tensor]:
        """Apply, by the kernels, selections of this class that suit them: ``apply_`` of all in a few launches."""
        raise NotImplementedError

    def pack(self, threshold: Tensor | None = None) -> PackedSelection:
        """The same selection at 1 bit per entry, which will show this threshold."""
        mask = self.mask()
        return PackedSelection(pack_selection(mask), mask.shape, threshold)

    def compact(self, values: Tensor) -> Tensor:
        """The selected entries of a tensor of the part's shape, 1-d, in row-major order."""
        return values.detach().masked_select(self.mask())

    def expand(self, values: Tensor) -> Tensor:
        """A tensor of the part's shape with these selected entries, as ``compact`` gives them, and zeros elsewhere."""
        mask = self.mask()
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)


class ThresholdSelection(Selection):
    """The entries whose score has at least the threshold's magnitude and is not zero.

    NaN ranks above everything: it is always selected, and a NaN threshold selects nothing else.

    Args:
        score: of this process's entries; the gradient itself, another tensor of its shape, or a product.
        threshold, count, nonfinite: see :class:`Selection`.
        search: see :class:`gmt_tune.masking.search.found.Found`.
    """

    def __init__(
        self,
        score: Tensor | Product,
        threshold: Tensor,
        count: Tensor | None = None,
        nonfinite: Tensor | None = None,
        search: Any = None,
    ) -> None:
        self.score, self.search = score, search
        self.threshold: Tensor = threshold.to(score.device)
        self.count, self.nonfinite = count, nonfinite

    def smallest(self) -> Tensor:
        """The magnitude bits from which entries are selected, 0-d int32."""
        return smallest_selected_bits(self.threshold, self.score.dtype)

    def mask(self) -> Tensor:
        score = self.score.read(lambda t: t) if isinstance(self.score, Product) else self.score
        return magnitude_bits(score) >= self.smallest()

    def pack(self, threshold: Tensor | None = None) -> PackedSelection:
        smallest = self.smallest()
        score = self.score
        if isinstance(score, Tensor) and (library := native.load_for(score)) is not None:
            packed = torch.empty((score.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
            given = *native.entries(score), int(smallest), native.pointer(packed)
            library.pack_entries(*given, torch.get_num_threads())
            return PackedSelection(packed, score.shape, threshold)
        # Block by block: neither the bool tensor nor the product is ever there as a whole
        packed = pack_selection(score, lambda block: magnitude_bits(block) >= smallest)
        return PackedSelection(packed, score.shape, threshold)

    def apply_(self, grad: Tensor) -> Tensor:
        if self.score is grad and grad.device.type == "cpu":
            # One vectorised operation: it zeroes what lies within [-lambd, lambd], so not NaN
            torch.ops.aten.hardshrink.out(grad, self._largest_dropped(), out=grad)
            return torch.count_nonzero(grad.view(INT_DTYPE[grad.dtype])) if self.count is None else self.count
        smallest = self.smallest()
        count = torch.zeros((), dtype=torch.int64, device=grad.device)
        factors = [self.score.grad, self.score.weight] if isinstance(self.score, Product) else [self.score]
        for grad_block, *score_blocks in blocks_of_each([grad, *factors], _BLOCK["cpu" if grad.is_cpu else "other"]):
            bits = magnitude_bits(math.prod(score_blocks[1:], start=score_blocks[0]))
            # Integers 0 and 1: multiplying the bits by them is faster than filling by a bool mask, and zeroes NaN.
            kept = torch.ge(bits, smallest, out=bits)
            count += kept.sum(dtype=torch.int32)
            grad_bits = grad_block.view(INT_DTYPE[grad.dtype])
            grad_bits.mul_(kept.to(grad_bits.dtype))
        return count

    def suits(self, kernels: ModuleType, grad: Tensor) -> bool:
        return kernels.can_apply(grad, self.score)

    @staticmethod
    def apply_together_(kernels: ModuleType, grads: Sequence[Tensor], selections: Sequence[Any]) -> list[Tensor]:
        return kernels.apply_thresholds_(grads, *_thresholds_of(selections))

    def _largest_dropped(self) -> float:
        """The largest magnitude that is not selected; waits for the device."""
        dtype = self.score.dtype
        if self.threshold.dtype == dtype:
            smallest = max(1, int(self.threshold.view(INT_DTYPE[dtype])) & MAGNITUDE_MASK[dtype])
        else:
            smallest = int(self.smallest())
        return bits_to_float(min(smallest - 1, INFINITY_BITS[dtype]), dtype)


class PackedSelection(Selection):
    """A selection that was kept, at 1 bit per entry.

    Args:
        bits: uint8, as :func:`gmt_tune.masking.packing.pack_selection` lays them out.
        shape: of the part's entries.
        threshold: the one it was made with, if any.
    """

    def __init__(self, bits: Tensor, shape: Sequence[int], threshold: Tensor | None = None) -> None:
        self.bits, self.shape, self.threshold = bits, torch.Size(shape), threshold

    def mask(self) -> Tensor:
        return unpack_selection(self.bits, self.shape.numel()).view(self.shape)

    def apply_(self, grad: Tensor) -> Tensor:
        return apply_packed_(grad, self.bits)

    def suits(self, kernels: ModuleType, grad: Tensor) -> bool:
        return kernels.can_pack(grad)

    @staticmethod
    def apply_together_(kernels: ModuleType, grads: Sequence[Tensor], selections: Sequence[Any]) -> list[Tensor]:
        return kernels.apply_packed_selections_(grads, [selection.bits for selection in selections])


class PlacedSelection(Selection):
    """A selection that was kept by the places of its entries: what compact gradients and states lie by.

    Args:
        places: of the selected entries.
        shape: of the part's entries.
        threshold: the one it was made with, if any.
    """

    def __init__(self, places: Places, shape: Sequence[int], threshold: Tensor | None = None) -> None:
        self.places, self.shape, self.threshold = places, torch.Size(shape), threshold

    @property
    def bits(self) -> Tensor:
        """As :func:`gmt_tune.masking.packing.pack_selection` lays them out."""
        return self.places.bits()

    def mask(self) -> Tensor:
        return unpack_selection(self.bits, self.shape.numel()).view(self.shape)

    def compact(self, values: Tensor) -> Tensor:
        return self.places.gather(values.detach())


class RandomSelection(Selection):
    """Entries that a hash of their place in the whole gradient draws, each with probability ``density``.

    Args:
        part: whose entries.
        density: in (0, 1].
        key: of the draw; see :func:`gmt_tune.masking.draws.random_key`.
    """

    outlasts_step = False

    def __init__(self, part: Part, density: float, key: int) -> None:
        self._part, self._density, self._key = part, density, key

    def mask(self) -> Tensor:
        mask = torch.ones(self._part.local.shape, device=self._part.local.device)
        self.apply_(mask)
        return mask.bool()

    def apply_(self, grad: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.int64, device=grad.device)
        if grad.numel() == 0:
            return count
        offset = offset_in_whole(self._part)
        if offset is not None:
            return apply_random_(grad, self._density, self._key, offset=offset)
        shape = self._part.grad.shape
        (first, last), *others = self._part.ranges()
        row = math.prod(shape[1:])
        # Other ranks hold a part of each row: draw whole rows, and keep what is ours
        step = max(1, CHUNK // row)
        for start in range(first, last, step):
            stop = min(start + step, last)
            kept = random_selection(start * row, stop * row, self._density, self._key, grad.device)
            kept = kept.view(stop - start, *shape[1:])
            for dim, (low, high) in enumerate(others, start=1):
                kept = kept.narrow(dim, low, high - low)
            grad[start - first : stop - first].masked_fill_(~kept, 0)
            count += kept.sum()
        return count

    def suits(self, kernels: ModuleType, grad: Tensor) -> bool:
        return grad.is_contiguous() and offset_in_whole(self._part) is not None

    @staticmethod
    def apply_together_(kernels: ModuleType, grads: Sequence[Tensor], selections: Sequence[Any]) -> list[Tensor]:
        draws = [(signed(s._key, 64), offset_in_whole(s._part), last_drawn(s._density)) for s in selections]
        return kernels.apply_random_draws_(grads, draws, ROUNDS)


def offset_in_whole(part: Part) -> int | None:
    """The flat index in the whole gradient of a part's first entry, where the part is one range of such."""
    shape = part.grad.shape
    if not shape:
        return 0
    (first, _), *others = part.ranges()
    is_range = all((0, size) == held for size, held in zip(shape[1:], others, strict=True))
    return first * math.prod(shape[1:]) if is_range else None


class WholeSelection(Selection):
    """All entries of a part, or none."""

    outlasts_step = False

    def __init__(self, part: Part, is_selected: bool = True) -> None:
        self._local, self.is_selected = part.local, is_selected
        self.count: Tensor = torch.tensor(part.numel if is_selected else 0, device="cpu")

    def mask(self) -> Tensor:
        return torch.full(self._local.shape, self.is_selected, device=self._local.device)

    def apply_(self, grad: Tensor) -> Tensor:
        if not self.is_selected:
            grad.zero_()
        return self.count


@torch.no_grad()
def apply_(parts: Sequence[Part], selections: Sequence[Selection]) -> list[Tensor]:
    """Zero, in place, what ``selections`` leave out of the gradients of ``parts``, without waiting for a CUDA device.

    Returns:
        For each gradient a 0-d int64 tensor: how many entries of the whole gradient stay.
    """
    own = _apply_by_kernels_(parts, selections)
    for i, (part, selection) in enumerate(zip(parts, selections, strict=True)):
        if i not in own:
            own[i] = selection.apply_(part.local)
    counts = [own[i] if selection.count is None else selection.count for i, selection in enumerate(selections)]
    unknown = [i for i, selection in enumerate(selections) if selection.count is None]
    for i, total in zip(unknown, sum_counts([own[i] for i in unknown], [parts[i] for i in unknown]), strict=True):
        counts[i] = total
    return counts


def _apply_by_kernels_(parts: Sequence[Part], selections: Sequence[Selection]) -> dict[int, Tensor]:
    """Apply, in a few launches, what Triton's kernels can: own counts by position."""
    filled = [i for i, part in enumerate(parts) if is_served(part.local.device) and part.local.numel()]
    kernels = kernels_for([parts[i].local for i in filled])
    kinds: dict[type[Selection], list[int]] = {}
    for i in filled:
        if kernels is not None and selections[i].suits(kernels, parts[i].local):
            kinds.setdefault(type(selections[i]), []).append(i)
    own: dict[int, Tensor] = {}
    for kind, members in kinds.items():
        grads, chosen = [parts[i].local for i in members], [selections[i] for i in members]
        counts = try_triton(kind.apply_together_, kernels, grads, chosen)
        own.update(zip(members, counts, strict=True) if counts is not None else ())
    return own


def pack(selections: Sequence[Selection], thresholds: Sequence[Tensor | None]) -> list[PackedSelection]:
    """:meth:`Selection.pack` of each, with its threshold; on a GPU in a few launches for all."""
    ranked = {i: s for i, s in enumerate(selections) if type(s) is ThresholdSelection and s.score.numel()}
    kernels = kernels_for([s.score for s in ranked.values()])
    able = {i: s for i, s in ranked.items() if kernels is not None and kernels.can_pack(s.score)}
    bits = None
    if able:
        values, scores, searches = _thresholds_of(list(able.values()))
        bits = try_triton(kernels.pack_thresholds, scores, values, searches)  # type: ignore[union-attr]
    packed = dict(zip(able, bits, strict=True)) if bits is not None else {}
    return [
        PackedSelection(packed[i], able[i].score.shape, threshold) if i in packed else selection.pack(threshold)
        for i, (selection, threshold) in enumerate(zip(selections, thresholds, strict=True))
    ]


def _thresholds_of(selections: Sequence[ThresholdSelection]) -> tuple[list, list, list]:
    return [s.threshold for s in selections], [s.score for s in selections], [s.search for s in selections]
