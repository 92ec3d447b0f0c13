"""The k-th largest magnitude digit by digit, from counts alone: on any device, over any number of ranks.

Level by level, entries are counted by the next few bits of their magnitude, beginning with the highest:

    counts[b] = #{x : clamp((bits(x) >> shift) - (prefix << width), 0, 2**width - 1) = b}

where ``prefix`` holds the digits that are known. The first bin also takes what lies below the prefix and the last one
what lies above, so the counts from bin b > 0 on, added up, are how many entries have at least that digit; the largest
digit that k entries reach is the next one of the k-th largest. Counts of shards add up: all tensors' travel together,
in one all-reduce a level. No rank holds a whole tensor, and nothing waits for the device.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking.bits import INFINITY_BITS, from_bits, magnitude_bits
from gmt_tune.masking.nonfinite import nonfinite_flags
from gmt_tune.masking.parts import Part, sum_over_ranks
from gmt_tune.masking.search.devices import is_served, kernels_for, try_triton
from gmt_tune.masking.search.entries import Product, read_blocks
from gmt_tune.masking.search.found import Found, Set, common_dtype

_BLOCK = {"cpu": 1 << 18, "other": 1 << 23}  # entries counted at a time: bounds the passing memory


class Level(NamedTuple):
    """One digit of the magnitude: ``width`` bits, ``shift`` bits from the right."""

    shift: int
    width: int


def _levels(*widths: int) -> tuple[Level, ...]:
    return tuple(Level(sum(widths[i + 1 :]), width) for i, width in enumerate(widths))


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
LEVELS: dict[torch.dtype, tuple[Level, ...]] = {torch.float32: _levels(11, 10, 10)} | dict.fromkeys(
    _SIXTEEN_BITS, _levels(8, 7)
)
# The counting kernel has 32 bins. All ranks must use the same levels, so the kind of device decides on them, and not
# whether Triton works on a rank.
KERNEL_LEVELS: dict[torch.dtype, tuple[Level, ...]] = {torch.float32: _levels(5, 5, 5, 5, 5, 5, 1)} | dict.fromkeys(
    _SIXTEEN_BITS, _levels(5, 5, 5)
)


def find_thresholds(sets: Sequence[Set], ks: Sequence[int]) -> list[Found]:
    """:func:`gmt_tune.masking.search.find_thresholds`, for entries on any device, sharded or not."""
    searches: dict[tuple, list[int]] = {}
    for i, one in enumerate(sets):
        searches.setdefault((common_dtype(one), one[0][0].device), []).append(i)
    groups = [
        _Search([sets[i] for i in members], [ks[i] for i in members], dtype, device)
        for (dtype, device), members in searches.items()
    ]
    for depth in range(max(len(group.levels) for group in groups)):
        going_on = [group for group in groups if depth < len(group.levels)]
        rows = [row for group in going_on for row in group.count(depth)]
        parts = [part for group in going_on for _, part in group.members]
        is_small = all(part.numel < 2**31 for part in parts if part.groups)
        totals = iter(sum_over_ranks(rows, parts, is_small=is_small))
        for group in going_on:
            group.descend([next(totals) for _ in group.members], depth)
    found: list[Any] = [None] * len(sets)
    for group, members in zip(groups, searches.values(), strict=True):
        for i, one in zip(members, group.found(), strict=True):
            found[i] = one
    return found


class _Search:
    """Sets of one dtype whose thresholds are found together."""

    def __init__(self, sets: Sequence[Set], ks: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.members = [member for one in sets for member in one]
        self.levels = (KERNEL_LEVELS if is_served(device) else LEVELS)[dtype]
        self._sizes = [len(one) for one in sets]
        self._dtype, self._device = dtype, device
        set_of_member = [i for i, size in enumerate(self._sizes) for _ in range(size)]
        self._ks, self._set_of_member = _on_device(tuple(ks), device), _on_device(tuple(set_of_member), device)
        self._prefixes = torch.zeros_like(self._ks)
        self._nonfinite: list[Tensor] = []
        self._selected = self._set_of_member  # of each member: entries with at least the digits found so far
        # Members that the kernels can read; the others are counted by PyTorch's operations
        self._by_kernels: list[int] = []
        kernels = kernels_for([score for score, _ in self.members])
        if kernels is not None:
            counted = [i for i, (score, part) in enumerate(self.members) if part.is_counted and score.numel()]
            self._by_kernels = [i for i in counted if kernels.can_search([self.members[i][0]], dtype)]
            self._counter = kernels.Counter([self.members[i][0] for i in self._by_kernels])

    def count(self, depth: int) -> list[Tensor]:
        """This process's counts of each member, int64; at the first level, 1 follows if its gradient is not finite."""
        level = self.levels[depth]
        prefixes = self._prefixes[self._set_of_member]
        rows: dict[int, Tensor] = {}
        if self._by_kernels:
            some = prefixes[_on_device(tuple(self._by_kernels), self._device)]
            counted = try_triton(self._counter.count, some, level.shift, level.width, depth == 0)
            if counted is None:
                self._by_kernels = []
            else:
                rows = dict(zip(self._by_kernels, counted.unbind(), strict=True))
        for i, (score, part) in enumerate(self.members):
            if i not in rows:
                rows[i] = self._count_by_torch(score, part, prefixes[i], level)
            if depth:
                rows[i] = rows[i][: 1 << level.width]
            elif score is not part.local:
                rows[i][-1] = nonfinite_flags([part.local])[0] if part.is_counted else 0
        return [rows[i] for i in range(len(self.members))]

    def _count_by_torch(self, score: Tensor | Product, part: Part, prefix: Tensor, level: Level) -> Tensor:
        bins = 1 << level.width
        counts = torch.zeros(bins + 1, dtype=torch.int64, device=score.device)
        if part.is_counted and score.numel():
            prefix = prefix.to(score.device)
            infinity = INFINITY_BITS[self._dtype]
            for block in read_blocks(score, _block(score)):
                block = block.to(self._dtype)
                counts[:bins] += count_digits(block, prefix, level)
                if level is self.levels[0] and infinity % (1 << level.shift):
                    counts[-1] += (magnitude_bits(block) >= infinity).any()
            if level is self.levels[0] and not infinity % (1 << level.shift):
                counts[-1] = counts[infinity >> level.shift : bins].sum()
        return counts

    def descend(self, rows: Sequence[Tensor], depth: int) -> None:
        """Find the next digit of each set from the counts of whole tensors."""
        bins = 1 << self.levels[depth].width
        if depth == 0:
            self._nonfinite = [row[-1] > 0 for row in rows]
        counts = torch.stack([row[:bins].to(self._device) for row in rows])
        of_sets = counts.new_zeros(len(self._sizes), bins).index_add_(0, self._set_of_member, counts)
        digits, self._prefixes = _descend(of_sets, self._prefixes, self._ks)
        if depth == len(self.levels) - 1:
            # Entries equal to a threshold of zero are zeros, which are never selected
            digits = torch.where(self._prefixes == 0, 1, digits)
        digits = digits[self._set_of_member]
        reached = _at_least(counts).gather(1, digits[:, None]).squeeze(1)
        # The first bin takes more than digit 0; but what has at least that digit has at least the digits before
        self._selected = torch.where(digits == 0, self._selected, reached)

    def found(self) -> list[Found]:
        thresholds = from_bits(self._prefixes, self._dtype).unbind()
        selected, flags = iter(self._selected.unbind()), iter(self._nonfinite)
        return [
            Found(threshold, [next(selected) for _ in range(size)], [next(flags) for _ in range(size)])
            for threshold, size in zip(thresholds, self._sizes, strict=True)
        ]


def count_digits(tensor: Tensor, prefix: Tensor | int, level: Level) -> Tensor:
    """Count entries by their next digit, as the formula above says.

    Args:
        tensor: a block of entries, of any shape and stride; float32, bfloat16 or float16.
        prefix: the digits above this level; 0 at the first level. An int or a 0-d integer tensor.
        level: which digit to count by.

    Returns:
        int64 tensor of ``2**level.width`` counts, on the tensor's device.
    """
    bins = 1 << level.width
    digits = magnitude_bits(tensor).reshape(-1).to(torch.int32) >> level.shift
    digits = digits.sub_(prefix << level.width).clamp_(0, bins - 1)
    if tensor.device.type == "cpu":
        return torch.bincount(digits, minlength=bins)
    counts = torch.zeros(bins, dtype=torch.int64, device=tensor.device)  # bincount would wait for the device
    return counts.scatter_add_(0, digits.long(), counts.new_ones(()).expand(digits.numel()))


def kth_bits(read: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> Tensor:
    """Magnitude bits of the k-th largest entry of all tensors together, as a 0-d int64 tensor.

    Args:
        read: gives the tensors in blocks, all of ``dtype`` and on one device; called once for each level.
        k: rank from the top.
        dtype: of the tensors.
    """
    prefix = torch.zeros(1, dtype=torch.int64, device="cpu")
    for level in LEVELS[dtype]:
        counts: Any = sum(count_digits(tensor, prefix[0], level) for tensor in read())
        prefix = _descend(counts[None], prefix.to(counts.device), k)[1]
    return prefix[0]


def _descend(counts: Tensor, prefixes: Tensor, ks: Tensor | int) -> tuple[Tensor, Tensor]:
    """The next digit of each row's k-th largest entry, and the prefixes with it; int64 [rows]."""
    ks = ks[:, None] if isinstance(ks, Tensor) else ks
    # All entries have at least digit 0, also those below the prefix
    digits = (_at_least(counts)[:, 1:] >= ks).sum(1)
    return digits, prefixes * counts.shape[1] + digits


def _at_least(counts: Tensor) -> Tensor:
    """From counts of digits: how many entries have at least each digit."""
    return counts.flip(1).cumsum(1).flip(1)


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant of the training on its device: copied once, not at every step."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def _block(tensor: Tensor | Product) -> int:
    return _BLOCK["cpu" if tensor.device.type == "cpu" else "other"]
