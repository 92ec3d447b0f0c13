"""How far a fine-tuned checkpoint went from its base: fraction of entries changed and norm of the change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmt_tune.errors import UserError
from gmt_tune.reporting.parameter_names import split_name
from gmt_tune.reporting.weights_reader import Weights

__all__ = ["Change", "Diff", "compare"]

# Entries that are compared together: few enough that they stay in the cache from one operation to the next.
_SLICE = 1 << 20

COLUMNS = ("entries", "changed", "norm of change", "relative", "largest")

_OUTPUT, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class Change:
    """The change of one tensor, or of several together.

    Attributes:
        numel: entries.
        changed: entries that differ.
        square_of_change: sum over the entries, of tuned minus base.
        square_of_base: sum over the base's entries.
        largest: magnitude by which an entry changed.
        nonfinite: entries that are NaN or infinite on either side; they are in no norm.
        tensors: how many there are.
    """

    numel: int = 0
    changed: int = 0
    square_of_change: float = 0.0
    square_of_base: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    tensors: int = 0

    def __add__(self, other: Change) -> Change:
        return Change(
            self.numel + other.numel,
            self.changed + other.changed,
            self.square_of_change + other.square_of_change,
            self.square_of_base + other.square_of_base,
            max(self.largest, other.largest),
            self.nonfinite + other.nonfinite,
            self.tensors + other.tensors,
        )

    @property
    def fraction(self) -> float:
        """Of the entries that changed."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def norm(self) -> float:
        """Of the change."""
        return math.sqrt(self.square_of_change)

    @property
    def relative(self) -> float:
        """Norm of the change over the base's norm; infinite where only the base is zero."""
        if self.square_of_change == 0:
            return 0.0
        return math.sqrt(self.square_of_change / self.square_of_base) if self.square_of_base else math.inf

    def cells(self) -> list[str]:
        """Of a table, under ``COLUMNS``."""
        numbers = f"{self.norm:.4g}", f"{self.relative:.3g}", f"{self.largest:.3g}"
        return [f"{self.numel:,}", f"{self.fraction:.2%}", *numbers]

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: what is infinite becomes None."""
        return {
            "tensors": self.tensors,
            "entries": self.numel,
            "changed": self.changed,
            "fraction_changed": self.fraction,
            "norm_of_change": self.norm,
            "relative_change": self.relative if math.isfinite(self.relative) else None,
            "largest_change": self.largest,
            "nonfinite": self.nonfinite,
        }


@dataclass
class Diff:
    """What changed between two checkpoints.

    Attributes:
        base, tuned: the two.
        tensors: changes by name, in the order of the base.
        notes: sentences on what was cast, tied, missing or not comparable.
        missing: names that only the base has.
        extra: names that only the tuned model has.
        reshaped: names whose shapes differ.
    """

    base: Weights
    tuned: Weights
    tensors: dict[str, Change] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    @property
    def total(self) -> Change:
        """Of all tensors together."""
        return sum(self.tensors.values(), Change())

    def by_module(self) -> dict[str, Change]:
        """Summed over the layers; parameters outside the layers stand by themselves."""
        return self._grouped(lambda name: split_name(name)[1])

    def by_layer(self) -> dict[int, Change]:
        """Summed over the modules of each layer."""
        return dict(sorted(self._grouped(lambda name: split_name(name)[0]).items()))

    def moved_most(self, count: int) -> list[tuple[str, Change]]:
        """The tensors with the largest relative change, the largest first, ``count`` at most; none that stood still."""
        moved = [item for item in self.tensors.items() if item[1].square_of_change > 0]
        return sorted(moved, key=lambda item: item[1].relative, reverse=True)[:count]

    def _grouped(self, key: Callable) -> dict:
        groups: dict = {}
        for name, change in self.tensors.items():
            if key(name) is not None:
                groups[key(name)] = groups.get(key(name), Change()) + change
        return groups


def compare(base: Weights, tuned: Weights, watch: Callable[[Iterable[str]], Iterable[str]] = iter) -> Diff:
    """Compare two checkpoints tensor by tensor; each may be sharded in its own way.

    Where dtypes differ, both tensors are cast to the one with fewer digits first, so that rounding does not count
    as change; a note says so.

    Args:
        base, tuned: the two checkpoints.
        watch: wraps the names of the tensors as they are gone through, for a progress bar.

    Returns:
        The changes by tensor, and what could not be compared.

    Raises:
        UserError: if the two have no tensor of the same name and shape, or a file cannot be read.
    """
    diff = Diff(base, tuned)
    pairs = _pair(base, tuned, diff)
    if not pairs:
        raise UserError(
            f"{tuned.path} and {base.path} have no tensor in common (one has '{_first(tuned)}', the other "
            f"'{_first(base)}'): name two checkpoints of the same model in the same format"
        )
    casts: Counter[tuple[str, str]] = Counter()
    for name in watch(list(pairs)):
        in_base, in_tuned = pairs[name]
        before, after = base.tensors[in_base], tuned.tensors[in_tuned]
        if before.shape != after.shape:
            shapes = f"{_shape(before)} in BASE, {_shape(after)} in TUNED"
            diff.reshaped.append(name)
            diff.notes.append(f"{name} was not compared: its shape is {shapes}.")
            continue
        if before.dtype != after.dtype:
            casts[before.dtype, after.dtype] += 1
        slices = zip(base.slices(in_base, _SLICE), tuned.slices(in_tuned, _SLICE), strict=True)
        diff.tensors[name] = sum((_compare_slices(*pair) for pair in slices), Change(tensors=1))
    if not diff.tensors:
        raise UserError(
            f"no tensor of {tuned.path} has the shape that it has in {base.path} ({diff.notes[-1].rstrip('.')}): name "
            "two checkpoints of the same model"
        )
    for (in_base, in_tuned), count in casts.items():
        cast = f"{count} tensors are {in_base} in BASE and {in_tuned} in TUNED"
        diff.notes.insert(0, f"{cast}: both were cast to the dtype with fewer digits before comparing.")
    if diff.missing:
        diff.notes.append(f"Only in BASE: {_first_names(diff.missing)}.")
    if diff.extra:
        diff.notes.append(f"Only in TUNED: {_first_names(diff.extra)}.")
    return diff


def _pair(base: Weights, tuned: Weights, diff: Diff) -> dict[str, tuple[str, str]]:
    """Names to compare, with the name of each side's tensor, which differ for tied embeddings."""
    pairs: dict[str, tuple[str, str]] = {}
    in_both = [name for name in base.tensors if name in tuned.tensors]
    all_tied = base.ties_embeddings and tuned.ties_embeddings and any(name.endswith(_EMBEDDING) for name in in_both)
    for name in [*in_both, *sorted(base.tensors.keys() ^ tuned.tensors.keys())]:
        here, there, side = (base, tuned, "TUNED") if name in base.tensors else (tuned, base, "BASE")
        embedding = next((other for other in there.tensors if other.endswith(_EMBEDDING)), None)
        if name.endswith(_OUTPUT) and all_tied:  # whoever loads these models takes the embedding instead
            diff.notes.append(f"{name} is not counted: it is a second copy of the embedding.")
        elif name in there.tensors:
            pairs[name] = name, name
        elif name.endswith(_OUTPUT) and there.ties_embeddings and embedding is not None:
            pairs[name] = (name, embedding) if here is base else (embedding, name)
            diff.notes.append(f"{name} is compared with {embedding}, to which it is tied in {side}.")
        else:
            (diff.missing if here is base else diff.extra).append(name)
    return pairs


def _compare_slices(before: Tensor, after: Tensor) -> Change:
    dtype = _narrower(before.dtype, after.dtype)
    before, after = before.to(dtype), after.to(dtype)
    if dtype not in (torch.float32, torch.float64):
        # float32 holds every smaller float exactly; whole numbers go to float64
        wide = torch.float32 if dtype.is_floating_point else torch.float64
        before, after = before.to(wide), after.to(wide)
    change = after - before  # zero where, and only where, the two are equal
    changed = int(torch.count_nonzero(change))
    squares = _sum_of_squares(change), _sum_of_squares(before)
    nonfinite = 0
    if not all(map(math.isfinite, squares)):
        changed = int(((before != after) & ~(before.isnan() & after.isnan())).sum())
        finite = before.isfinite() & after.isfinite()
        nonfinite = finite.numel() - int(finite.sum())
        change, before = change.where(finite, 0), before.where(finite, 0)
        squares = _sum_of_squares(change), _sum_of_squares(before)
    largest = float(max(abs(end) for end in torch.aminmax(change))) if change.numel() else 0.0
    return Change(before.numel(), changed, *squares, largest, nonfinite)


def _sum_of_squares(tensor: Tensor) -> float:
    # In two stages, so that no float64 copy of the tensor is made
    rows = tensor.reshape(-1).split(1 << 14)
    return float(torch.stack([torch.dot(row, row) for row in rows]).sum(dtype=torch.float64))


def _narrower(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype with fewer digits."""
    if first != second and first.is_floating_point and second.is_floating_point:
        return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.promote_types(first, second)


def _first(weights: Weights) -> str:
    return next(iter(weights.tensors), "nothing")


def _shape(info) -> str:
    return " x ".join(map(str, info.shape)) or "a single number"


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
