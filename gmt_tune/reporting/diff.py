"""How far a fine-tuned checkpoint went from its base: fraction of entries changed and norm of the change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmt_tune.errors import UserError
from gmt_tune.reporting.parameter_names import split_name
from gmt_tune.reporting.weights_reader import Weights

# Entries that are compared together: few enough that they stay in the cache from one operation to the next.
_SLICE = 1 << 20

_OUTPUT, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass
class Change:
    """The change of one tensor, or of several together.

    Attributes:
        numel: entries compared.
        changed: entries that differ.
        square_of_change, square_of_base: sums of squares, of tuned minus base and of base.
        largest: the largest magnitude by which an entry changed.
        nonfinite: entries that are NaN or infinite on either side; they are in no norm.
        tensors: how many tensors this is about.
    """

    numel: int = 0
    changed: int = 0
    square_of_change: float = 0.0
    square_of_base: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    tensors: int = 0

    def __iadd__(self, other: Change) -> Change:
        self.numel += other.numel
        self.changed += other.changed
        self.square_of_change += other.square_of_change
        self.square_of_base += other.square_of_base
        self.largest = max(self.largest, other.largest)
        self.nonfinite += other.nonfinite
        self.tensors += other.tensors
        return self

    @property
    def fraction(self) -> float:
        """Fraction of the entries that changed."""
        return self.changed / self.numel if self.numel else 0.0

    @property
    def norm(self) -> float:
        """L2 norm of the change."""
        return math.sqrt(self.square_of_change)

    @property
    def relative(self) -> float:
        """Norm of the change over the base's norm; infinite where only the base is zero."""
        if self.square_of_change == 0:
            return 0.0
        return math.sqrt(self.square_of_change / self.square_of_base) if self.square_of_base else math.inf

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
    """What :func:`compare` found.

    Attributes:
        tensors: change of each tensor by name, in the order of the base's files.
        notes: sentences on what was cast, tied, missing or not comparable.
        missing, extra: names that only the base, or only the tuned model, has.
        reshaped: names whose shapes differ.
    """

    tensors: dict[str, Change] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    @property
    def total(self) -> Change:
        """All tensors together."""
        return _sum(self.tensors.values())

    def by_module(self) -> dict[str, Change]:
        """Summed over the layers; parameters outside the layers stand by themselves."""
        return self._grouped(lambda name: split_name(name)[1])

    def by_layer(self) -> dict[int, Change]:
        """Summed over the modules of each layer."""
        return dict(sorted(self._grouped(lambda name: split_name(name)[0]).items()))

    def moved_most(self, count: int) -> list[tuple[str, Change]]:
        """The tensors with the largest relative change, the largest first; none that stood still."""
        moved = [item for item in self.tensors.items() if item[1].square_of_change > 0]
        return sorted(moved, key=lambda item: item[1].relative, reverse=True)[:count]

    def _grouped(self, key: Callable) -> dict:
        groups: dict = {}
        for name, change in self.tensors.items():
            if key(name) is not None:
                groups.setdefault(key(name), Change())
                groups[key(name)] += change
        return groups


def compare(base: Weights, tuned: Weights, watch: Callable[[Iterable[str]], Iterable[str]] = iter) -> Diff:
    """Compare two checkpoints tensor by tensor.

    Where dtypes differ, both tensors are cast to the one with fewer digits first, so that rounding does not count
    as change; a note says so.

    Args:
        base, tuned: opened folders; each may be sharded in its own way.
        watch: wraps the names of the tensors as they are gone through, for a progress bar.

    Raises:
        UserError: if the two have no tensor of the same name and shape, or a file cannot be read.
    """
    diff = Diff()
    pairs = _pair(base, tuned, diff)
    if not pairs:
        raise UserError(
            f"{tuned.path} and {base.path} have no tensor in common (one has '{_first(tuned)}', the other "
            f"'{_first(base)}'): name two checkpoints of the same model in the same format"
        )
    casts: dict[tuple[str, str], int] = {}
    for name in watch(list(pairs)):
        in_base, in_tuned = pairs[name]
        one, other = base.tensors[in_base], tuned.tensors[in_tuned]
        if one.shape != other.shape:
            diff.reshaped.append(name)
            diff.notes.append(f"{name} was not compared: its shape is {_shape(one)} in BASE, {_shape(other)} in TUNED.")
            continue
        if one.dtype != other.dtype:
            casts[one.dtype, other.dtype] = casts.get((one.dtype, other.dtype), 0) + 1
        change = Change(tensors=1)
        slices = zip(base.slices(in_base, _SLICE), tuned.slices(in_tuned, _SLICE), strict=True)
        for before, after in slices:
            change += _compare_slices(before, after)
        diff.tensors[name] = change
    if not diff.tensors:
        raise UserError(
            f"no tensor of {tuned.path} has the shape that it has in {base.path} ({diff.notes[-1].rstrip('.')}): name "
            "two checkpoints of the same model"
        )
    for (one, other), count in casts.items():
        diff.notes.insert(
            0,
            f"{count} tensors are {one} in BASE and {other} in TUNED: both were cast to the dtype with fewer digits "
            "before comparing.",
        )
    if diff.missing:
        diff.notes.append(f"Only in BASE: {_some(diff.missing)}.")
    if diff.extra:
        diff.notes.append(f"Only in TUNED: {_some(diff.extra)}.")
    return diff


def _pair(base: Weights, tuned: Weights, diff: Diff) -> dict[str, tuple[str, str]]:
    """Names to compare, with the name of each side's tensor, which differ for tied embeddings."""
    pairs = {name: (name, name) for name in base.tensors if name in tuned.tensors}
    for name in [name for name in pairs if name.endswith(_OUTPUT)]:
        if base.ties_embeddings and tuned.ties_embeddings and any(other.endswith(_EMBEDDING) for other in pairs):
            del pairs[name]  # whoever loads these models takes the embedding instead
            diff.notes.append(f"{name} is not counted: it is a second copy of the embedding.")
    for name in sorted(base.tensors.keys() ^ tuned.tensors.keys()):
        here, there, side = (base, tuned, "TUNED") if name in base.tensors else (tuned, base, "BASE")
        embedding = next((other for other in there.tensors if other.endswith(_EMBEDDING)), None)
        if name.endswith(_OUTPUT) and there.ties_embeddings and embedding is not None:
            if here.ties_embeddings:
                diff.notes.append(f"{name} is not counted: it is a second copy of the embedding.")
                continue
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


def _narrower(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype with fewer digits."""
    if one == other:
        return one
    if one.is_floating_point and other.is_floating_point:
        return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.promote_types(one, other)


def _sum(changes: Iterable[Change]) -> Change:
    total = Change()
    for change in changes:
        total += change
    return total


def _first(weights: Weights) -> str:
    return next(iter(weights.tensors), "nothing")


def _shape(info) -> str:
    return " x ".join(map(str, info.shape)) or "a single number"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
