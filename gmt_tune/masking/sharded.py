"""The mask on sharded gradients: the entries and thresholds of the whole tensors, which no rank ever holds.

Every rank counts its own entries by the digits of their magnitude (see ``histogram``); the counts of all
tensors travel together, in one all-reduce for each digit: two for bfloat16 and float16, three for float32,
and a few MB, whatever the model's size. They also tell how many entries stay and whether any is not finite.
Everything else is local.

Where tensors of one model live on different meshes (tensor parallelism in 2-D, norms in 1-D), each mesh
makes its own all-reduces. With an optimizer per parameter, each parameter does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gmt_tune.masking import selection as sel
from gmt_tune.masking.bits import INFINITY_BITS, blocks, from_bits
from gmt_tune.masking.histogram import LEVELS, Level, descend, magnitude_histogram
from gmt_tune.masking.layout import (
    Layout,
    has_partial_sums,
    layouts,
    local_part,
    local_ranges,
    sum_over_ranks,
    with_placements_of,
)
from gmt_tune.masking.random_selection import CHUNK, random_selection

_BLOCK = 1 << 20  # entries converted to another dtype at a time


class Ranked(NamedTuple):
    """One gradient, and what its entries are ranked by.

    Attributes:
        grad: DTensor or plain tensor.
        score: gives the score, distributed as the gradient is; None ranks by the gradient itself. It is called
            several times in a step, so that not all scores need be alive together.
        dtype: of the score.
    """

    grad: Tensor
    score: Callable[[], Tensor] | None
    dtype: torch.dtype

    def local_score(self) -> Tensor:
        if self.score is None:
            return local_part(self.grad)
        return local_part(with_placements_of(self.score(), self.grad))


class Measured(NamedTuple):
    """Attributes:
    thresholds: one 0-d tensor for each gradient, in its score's dtype (scope "global": in the common one).
    selected: how many entries of each whole gradient stay, 0-d int64.
    """

    thresholds: list[Tensor]
    selected: list[Tensor]


def ranked_by_gradient(grad: Tensor) -> Ranked:
    """Ranks a gradient's entries by their own magnitude."""
    return Ranked(grad, None, grad.dtype)


def ranked_by_saliency(grad: Tensor, parameter: Tensor) -> Ranked:
    """Ranks a gradient's entries by the magnitude of gradient times weight, made anew at each use."""

    def score() -> Tensor:
        return grad * with_placements_of(parameter.detach(), grad)

    return Ranked(grad, score, torch.promote_types(grad.dtype, parameter.dtype))


def ranked_by(grad: Tensor, score: Tensor) -> Ranked:
    """Ranks a gradient's entries by the magnitude of a score that was made before.

    Raises:
        TypeError: if the gradient is sharded and the score is not: nothing tells which part it is.
    """
    if isinstance(grad, DTensor) and not isinstance(score, DTensor):
        raise TypeError(
            "the score of a sharded gradient must be a DTensor as well: make it from the gradient and the "
            "parameter that compute_score is given, not from their local parts"
        )
    return Ranked(grad, lambda: score, score.dtype)


def reduce_partial_sums_(parameters: Iterable[Tensor]) -> None:
    """Give each parameter whose gradient is still a sum over ranks to be made the gradient that it will be.

    Tensor parallelism leaves such gradients where nothing else reduces them; an optimizer would do it on
    first use. The result is distributed as the parameter is.
    """
    for p in parameters:
        if p.grad is not None and has_partial_sums(p.grad):
            p.grad = with_placements_of(p.grad, p)


def raise_if_nonfinite(named_grads: Mapping[str, Tensor], where: str = "") -> None:
    """:func:`gmt_tune.masking.checks.raise_if_nonfinite` for whole gradients: on all ranks, or on none."""
    if not named_grads:
        return
    parts = layouts(list(named_grads.values()))
    flags = sel.nonfinite_flags([part.local for part in parts])
    sums = sum_over_ranks([flag.long().view(1) for flag in flags], parts, is_small=True)
    sel.raise_for_flags(list(named_grads), torch.cat(sums).tolist(), where)


def sum_counts(grads: Sequence[Tensor], counts: Sequence[Tensor]) -> list[Tensor]:
    """Counts of the whole gradients from those of their local parts, 0-d int64."""
    sums = sum_over_ranks([count.long().view(1) for count in counts], layouts(grads), is_small=False)
    return [total.squeeze(0) for total in sums]


def measure(
    ranked: Sequence[Ranked],
    density: float,
    scope: str = "tensor",
    if_nonfinite: Callable[[list[bool]], None] | None = None,
) -> Measured:
    """The measuring step on whole gradients; all ranks call it with the same gradients in the same order.

    Args:
        ranked: gradients and their scores; float32, bfloat16 or float16.
        density: fraction of entries that stay, in (0, 1].
        scope: "tensor" or "global".
        if_nonfinite: called after the first collective, with a flag for each gradient: whether it holds NaN or
            infinity anywhere. What it raises is raised on all ranks. Waits for the device.

    Returns:
        Thresholds and numbers of entries that stay; infinity and 0 for a gradient without entries.
    """
    for r in ranked:
        sel.check_dtype(r.grad)
    parts = layouts([r.grad for r in ranked])
    numels = [r.grad.numel() for r in ranked]
    dtypes = [r.dtype for r in ranked]
    if scope == "global" and len(set(dtypes)) > 1:
        dtypes = [torch.float32] * len(ranked)
    search = _Search(ranked, parts, numels, dtypes)
    families = _families(parts, numels, dtypes, density, scope)
    for depth in range(max((len(family.levels) for family in families), default=0)):
        check = if_nonfinite if depth == 0 else None
        counts = search.count(families, depth, check is not None)
        if check is not None:
            check(search.nonfinite(counts))
        for family in families:
            if depth < len(family.levels):
                family.descend([counts[i] for i in family.members], depth)
    thresholds = [torch.full((), math.inf, dtype=d, device=p.local.device) for d, p in zip(dtypes, parts, strict=True)]
    selected = [torch.zeros((), dtype=torch.int64, device=p.local.device) for p in parts]
    for family in families:
        for i, threshold, count in zip(family.members, family.thresholds(), family.selected(), strict=True):
            if numels[i]:
                thresholds[i], selected[i] = threshold, count
    return Measured(thresholds, selected)


def apply_(ranked: Sequence[Ranked], thresholds: Sequence[Tensor], pack: bool = False) -> list[Tensor]:
    """The applying step on this rank's part of each gradient, in place.

    Returns:
        With ``pack``, the selections of the local parts as :func:`pack_selection` packs them; else nothing.
    """
    packed = []
    own, own_thresholds = [], []
    for r, threshold in zip(ranked, thresholds, strict=True):
        grad = local_part(r.grad)
        threshold = threshold.to(grad.device)
        score = grad if r.score is None else r.local_score()
        if pack:
            packed.append(sel.pack_selection(sel.selection(score, threshold)))
        if r.score is None:
            own.append(grad)
            own_thresholds.append(threshold)
        else:  # now, while only this score is alive
            sel.apply_thresholds_([grad], [threshold], [score])
    sel.apply_thresholds_(own, own_thresholds)
    return packed


def apply_random_(grad: Tensor, density: float, key: int) -> Tensor:
    """:func:`gmt_tune.masking.random_selection.apply_random_` on this rank's part of a gradient, in place.

    Returns:
        0-d int64 tensor: how many entries of the local part were drawn.
    """
    local = local_part(grad)
    count = torch.zeros((), dtype=torch.int64, device=local.device)
    if local.numel() == 0:
        return count
    if local.dim() == 0:
        return sel.apply_random_(local, density, key)
    (first, last), *others = local_ranges(grad)
    row = math.prod(grad.shape[1:])
    is_whole_row = all((0, size) == cut for size, cut in zip(grad.shape[1:], others, strict=True))
    if is_whole_row:
        return sel.apply_random_(local, density, key, offset=first * row)
    # Of each row, other ranks hold a part: draw whole rows, and keep what is ours
    step = max(1, CHUNK // row)
    for start in range(first, last, step):
        stop = min(start + step, last)
        kept = random_selection(start * row, stop * row, density, key, local.device)
        kept = kept.view(stop - start, *grad.shape[1:])
        for dim, (low, high) in enumerate(others, start=1):
            kept = kept.narrow(dim, low, high - low)
        local[start - first : stop - first].masked_fill_(~kept, 0)
        count += kept.sum()
    return count


def mask_grads_(
    named: Mapping[str, Tensor],
    density: float,
    scope: str,
    score: str,
    error_if_nonfinite: bool,
    seed: int,
    step: int,
) -> sel.MaskStatistics:
    """:func:`gmt_tune.mask_grads_` where gradients are sharded; all ranks call it with the same parameters.

    Args:
        named: parameters with a gradient, by the name that statistics give them; the others as checked there.
    """
    reduce_partial_sums_(named.values())
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    statistics = sel.MaskStatistics(numel={name: grad.numel() for name, grad in grads.items()})
    titles = [f"parameter {name}" for name in named]
    check = functools.partial(sel.raise_for_flags, titles) if error_if_nonfinite else None
    if error_if_nonfinite and (density == 1.0 or score == "random"):
        raise_if_nonfinite(dict(zip(titles, grads.values(), strict=True)))
    if density == 1.0:
        statistics.selected = {name: torch.tensor(n) for name, n in statistics.numel.items()}
    elif score == "random":
        keys = [sel.random_key(seed, step, name) for name in grads]
        counts = [apply_random_(grad, density, key) for grad, key in zip(grads.values(), keys, strict=True)]
        statistics.selected = dict(zip(grads, sum_counts(list(grads.values()), counts), strict=True))
    else:
        by_gradient = score == "magnitude"
        ranked = [
            ranked_by_gradient(grad) if by_gradient else ranked_by_saliency(grad, p)
            for grad, p in zip(grads.values(), named.values(), strict=True)
        ]
        thresholds, counts = measure(ranked, density, scope, check)
        apply_(ranked, thresholds)
        statistics.thresholds = dict(zip(grads, thresholds, strict=True))
        statistics.selected = dict(zip(grads, counts, strict=True))
    return statistics


class _Search:
    """Counts the entries of all gradients, digit by digit."""

    def __init__(self, ranked: Sequence[Ranked], parts: list[Layout], numels: list[int], dtypes: list) -> None:
        self._ranked, self._parts, self._dtypes = ranked, parts, dtypes
        self._is_small = max(numels, default=0) < 2**31

    def count(self, families: Sequence[_Family], depth: int, flags: bool) -> dict[int, Tensor]:
        """Counts of every gradient whose dtype has a digit at this depth, whole, by the gradient's position.

        With ``flags``, those of a score that is not the gradient end in how many parts are not finite.
        """
        todo = [(i, prefix) for f in families if depth < len(f.levels) for i, prefix in f.prefixes()]
        rows = [self._local_counts(i, prefix, LEVELS[self._dtypes[i]][depth], flags) for i, prefix in todo]
        sums = sum_over_ranks(rows, [self._parts[i] for i, _ in todo], self._is_small)
        return {i: row for (i, _), row in zip(todo, sums, strict=True)}

    def _local_counts(self, i: int, prefix: Tensor, level: Level, flags: bool) -> Tensor:
        r, part, dtype = self._ranked[i], self._parts[i], self._dtypes[i]
        has_flag = flags and r.score is not None
        counts = torch.zeros((1 << level.bits) + has_flag, dtype=torch.int64, device=part.local.device)
        if part.is_counted and part.local.numel():
            score = r.local_score()
            prefix = prefix.to(counts.device)
            for block in (score,) if score.dtype == dtype else blocks(score, _BLOCK):
                counts[: 1 << level.bits] += magnitude_histogram(block.to(dtype), prefix, level)
            if has_flag:
                counts[-1] = sel.nonfinite_flags([part.local])[0]
        return counts

    def nonfinite(self, counts: Mapping[int, Tensor]) -> list[bool]:
        """Whether each gradient holds NaN or infinity, from the counts of the first digit; waits for the device."""
        found = [False] * len(self._ranked)
        by_device: dict[torch.device, dict[int, Tensor]] = {}
        for i, row in counts.items():
            # Where entries are ranked by their own magnitude, the counts from infinity's digit on tell
            infinity = INFINITY_BITS[self._dtypes[i]] >> LEVELS[self._dtypes[i]][0].shift
            bad = row[infinity:] if self._ranked[i].score is None else row[-1:]
            by_device.setdefault(row.device, {})[i] = bad.sum()
        for bad in by_device.values():
            for i, count in zip(bad, torch.stack(list(bad.values())).tolist(), strict=True):
                found[i] = count > 0
        return found


class _Family:
    """Gradients whose thresholds are found in one go: of one dtype, or those that share one threshold."""

    def __init__(self, members: Sequence[int], dtype: torch.dtype, ks: tuple[int, ...], device: torch.device) -> None:
        self.members = list(members)
        self.levels = LEVELS[dtype]
        self._dtype, self._device = dtype, device
        self._is_shared = len(ks) < len(self.members)
        self._ranks = _on_device(ks, device)
        self._prefixes = torch.zeros_like(self._ranks)
        self._above: Tensor | int = 0  # of each member: entries above the threshold, so far
        self._equal: Tensor | int = 0  # of each member: entries with the digits found so far

    def prefixes(self) -> Iterable[tuple[int, Tensor]]:
        prefixes = self._prefixes.expand(len(self.members)) if self._is_shared else self._prefixes
        return zip(self.members, prefixes.unbind(), strict=True)

    def descend(self, rows: Sequence[Tensor], depth: int) -> None:
        bins = 1 << self.levels[depth].bits
        counts = torch.stack([row[:bins].to(self._device) for row in rows])
        merged = counts.sum(0, keepdim=True) if self._is_shared else counts
        self._prefixes, self._ranks = descend(merged, self._prefixes, self._ranks)
        digits = (self._prefixes % bins).expand(len(rows))[:, None]
        up_to = counts.cumsum(1).gather(1, digits).squeeze(1)
        self._above = self._above + counts.sum(1) - up_to
        self._equal = counts.gather(1, digits).squeeze(1)

    def thresholds(self) -> Iterable[Tensor]:
        thresholds = from_bits(self._prefixes, self._dtype)
        return thresholds.expand(len(self.members)).unbind()

    def selected(self) -> Iterable[Tensor]:
        # Entries equal to a threshold of zero are zeros, which are never selected
        return (self._above + self._equal * (self._prefixes > 0)).unbind()


def _families(
    parts: Sequence[Layout], numels: Sequence[int], dtypes: Sequence[torch.dtype], density: float, scope: str
) -> list[_Family]:
    """The gradients that have entries, one dtype and device together; for scope "global", all together."""
    if scope == "global":
        if not sum(numels):
            return []
        k = sel.entries_to_keep(sum(numels), density)
        return [_Family(range(len(parts)), dtypes[0], (k,), parts[0].local.device)]
    rows: dict[tuple, list[int]] = {}
    for i, (part, dtype) in enumerate(zip(parts, dtypes, strict=True)):
        if numels[i]:
            rows.setdefault((dtype, part.local.device), []).append(i)
    return [
        _Family(members, dtype, tuple(sel.entries_to_keep(numels[i], density) for i in members), device)
        for (dtype, device), members in rows.items()
    ]


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant of the training on its device: copied once, not at every step."""
    return torch.tensor(values, dtype=torch.int64, device=device)
