"""What entries are ranked by, as objects that make selections: the decisions that depend on the score are here."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from gmt_tune.masking.checks import check_dtype
from gmt_tune.masking.draws import random_key, random_ranks
from gmt_tune.masking.parts import Part, is_sharded
from gmt_tune.masking.search import find_thresholds
from gmt_tune.masking.search.entries import Product
from gmt_tune.masking.selection import RandomSelection, Selection, ThresholdSelection, offset_in_whole


class Score:
    """Ranks entries by a magnitude, and selects the largest: see the subclasses."""

    def sees_nonfinite(self, part: Part) -> bool:
        """Whether selecting shows that a gradient holds NaN or infinity, so that nothing else need look."""
        return bool(part.groups)

    def rank(self, part: Part) -> Tensor | Product:
        """What this process's entries of a gradient are ranked by, of the same shape."""
        raise NotImplementedError

    def select(self, parts: Sequence[Part], density: float, scopes: Sequence[Hashable]) -> list[Selection]:
        """For each part a selection of k = max(1, floor(density * n)) of the n entries in its scope, and ties.

        Args:
            parts: of gradients.
            density: in (0, 1].
            scopes: of each part; those of equal scopes compete. No more scores need be alive than those of a scope:
                give one at a time.
        """
        return list(select_largest(parts, [self.rank(part) for part in parts], density, scopes))

    def unscaled(self, threshold: Tensor | None, grad_scale: Tensor | None) -> Tensor | None:
        """A threshold without the loss scale that a fused optimizer will divide gradients by, inside its step."""
        if threshold is None or grad_scale is None:
            return threshold
        return threshold.float() / grad_scale.to(threshold.device)

    def batches(self, parts: Sequence[Part], scopes: Sequence[Hashable]) -> list[Sequence[Part]]:
        """The parts to select of together: all, unless their scores would take memory at the same time."""
        return [parts] if parts else []


class Magnitude(Score):
    """The magnitude of the gradient: Li et al., AAAI 2025."""

    def sees_nonfinite(self, part: Part) -> bool:
        return True

    def rank(self, part: Part) -> Tensor:
        return part.local


class Saliency(Score):
    """The magnitude of gradient times weight."""

    def rank(self, part: Part) -> Product:
        return Product(part.local, part.weight)


class Random(Score):
    """Draws entries, with probability ``density`` each, in place of ranking them.

    Args:
        seed: of all draws.
        draw: which draw is in force for a parameter's name; see :func:`gmt_tune.masking.draws.random_key`.
        is_exact: draw k entries, as the other scores do, in place of each with its probability.
    """

    def __init__(self, seed: int, draw: Callable[[str], int], is_exact: bool = False) -> None:
        self._seed, self._draw, self._is_exact = seed, draw, is_exact

    def sees_nonfinite(self, part: Part) -> bool:
        return False

    def rank(self, part: Part) -> Tensor:
        local, key = part.local, self._key(part)
        offset = offset_in_whole(part)
        if offset is not None:
            return random_ranks(offset, offset + local.numel(), key, local.device).view(local.shape)
        ranks = torch.empty(local.shape, device=local.device)
        shape = part.grad.shape
        (first, last), *others = part.ranges()
        row = math.prod(shape[1:])
        for i in range(first, last):  # other ranks hold a part of each row
            whole = random_ranks(i * row, (i + 1) * row, key, local.device).view(shape[1:])
            ranks[i - first] = whole[tuple(slice(*held) for held in others)]
        return ranks

    def select(self, parts: Sequence[Part], density: float, scopes: Sequence[Hashable]) -> list[Selection]:
        if self._is_exact:
            return super().select(parts, density, scopes)
        for part in parts:
            check_dtype(part.local)
        return [RandomSelection(part, density, self._key(part)) for part in parts]

    def _key(self, part: Part) -> int:
        return random_key(self._seed, self._draw(part.name), part.name)


class UserScore(Score):
    """A user's method: :meth:`gmt_tune.GradientMask.compute_score`.

    Args:
        compute: gets the name, the parameter and the gradient.
        grad_scale: what gradients are to be divided by before, a 0-d tensor, if anything.
    """

    def __init__(self, compute: Callable[[str, Tensor, Tensor], Tensor], grad_scale: Tensor | None) -> None:
        self._compute, self._grad_scale = compute, grad_scale

    def rank(self, part: Part) -> Tensor:
        grad = unscaled = part.grad
        if self._grad_scale is not None:  # float16 would underflow
            unscaled = (grad.float() if grad.dtype == torch.float16 else grad) / self._grad_scale.to(grad.device)
        score = self._compute(part.name, part.parameter, unscaled)  # type: ignore[arg-type]
        if not isinstance(score, Tensor) or score.shape != grad.shape or not score.is_floating_point():
            found = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"compute_score of '{part.name}' must return a floating-point tensor of shape "
                f"{tuple(grad.shape)}, got {found}"
            )
        if is_sharded(grad) and not is_sharded(score):
            raise TypeError(
                "the score of a sharded gradient must be a DTensor as well: make it from the gradient and the "
                "parameter that compute_score is given, not from their local parts"
            )
        if score is grad:
            return part.local
        local, own = part.local_of(score), part.local
        # What lies in the gradient's memory in another order would change while the gradient is zeroed
        shares_memory = local.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
        is_in_order = (local.data_ptr(), local.stride()) == (own.data_ptr(), own.stride())
        return local.clone() if shares_memory and not is_in_order else local

    def unscaled(self, threshold: Tensor | None, grad_scale: Tensor | None) -> Tensor | None:
        return threshold  # gradients were divided before

    def batches(self, parts: Sequence[Part], scopes: Sequence[Hashable]) -> list[Sequence[Part]]:
        if any(part.groups for part in parts):  # what is sharded shares collectives
            return super().batches(parts, scopes)
        return [[parts[i] for i in members] for members in _in_scopes(range(len(parts)), scopes)]


def select_largest(
    parts: Sequence[Part],
    scores: Sequence[Tensor | Product],
    density: float,
    scopes: Sequence[Hashable] | None = None,
) -> list[ThresholdSelection]:
    """The measuring step: the threshold of each part, or of the parts of a scope together, changing nothing.

    Args:
        parts: of gradients; where they are sharded, all ranks give the same ones in the same order.
        scores: of each part's entries, on the same device.
        density: fraction of entries that stay, in (0, 1].
        scopes: of each part; None: each is its own.

    Returns:
        Selections; within a scope their thresholds are equal, and of the scores' dtype, or float32 where dtypes
        differ. The threshold of a gradient without entries is infinity.
    """
    for score in scores:
        check_dtype(score)
    filled = [i for i, part in enumerate(parts) if part.numel]
    groups = _in_scopes(filled, range(len(parts)) if scopes is None else scopes)
    ks = [entries_to_keep(sum(parts[i].numel for i in group), density) for group in groups]
    found = find_thresholds([[(scores[i], parts[i]) for i in group] for group in groups], ks)
    selections = {}
    for group, result in zip(groups, found, strict=True):
        for i, count, flag in zip(group, result.selected, result.nonfinite, strict=True):
            is_gradients = scores[i] is parts[i].local or parts[i].groups
            selections[i] = ThresholdSelection(
                scores[i], result.threshold, count, flag if is_gradients else None, result.search
            )
    return [selections[i] if i in selections else _select_nothing(score) for i, score in enumerate(scores)]


def _in_scopes(indices: Iterable[int], scopes: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for i in indices:
        members.setdefault(scopes[i], []).append(i)
    return list(members.values())


def _select_nothing(score: Tensor | Product) -> ThresholdSelection:
    zero = torch.zeros((), dtype=torch.int64, device=score.device)
    return ThresholdSelection(
        score, torch.full((), math.inf, dtype=score.dtype, device=score.device), zero, zero.bool()
    )


def entries_to_keep(n: int, density: float) -> int:
    """k of n entries: ``max(1, floor(density * n))``, the product rounded to double as Python does."""
    return max(1, math.floor(density * n))


def make_score(name: str, seed: int, draw: Callable[[str], int], is_exact: bool = False) -> Score:
    """The score of a name in ``checks.SCORES``; see :class:`Random` for the other arguments."""
    return {"magnitude": Magnitude, "saliency": Saliency}[name]() if name != "random" else Random(seed, draw, is_exact)
