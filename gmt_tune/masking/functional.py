"""The mask as functions, in the manner of ``torch.nn.utils.clip_grad_norm_``."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmt_tune.masking.checks import check_density, check_dtype, check_scope, check_score
from gmt_tune.masking.host import to_host
from gmt_tune.masking.nonfinite import raise_for_flags
from gmt_tune.masking.parts import Part, make_parts, nonfinite_gradients, part_of
from gmt_tune.masking.scores import make_score
from gmt_tune.masking.search import find_thresholds
from gmt_tune.masking.selection import Selection, WholeSelection, apply_


@dataclass(frozen=True)
class MaskNumbers:
    """What :class:`MaskStatistics` holds, on the host: by name, thresholds, and numbers of entries that stayed."""

    thresholds: dict[str, float]
    selected: dict[str, int]


@dataclass
class MaskStatistics:
    """What one masking did. Holds 0-d tensors on the device; :meth:`read` and ``density`` wait for the device.

    Attributes:
        thresholds: name (or position) of each tensor to its 0-d threshold; empty for score "random".
        selected: name to a 0-d int64 tensor: entries that stayed.
        numel: name to the number of entries.
    """

    thresholds: dict[str, Tensor] = field(default_factory=dict)
    selected: dict[str, Tensor] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)
    _numbers: MaskNumbers | None = field(default=None, init=False, repr=False, compare=False)  # once they were read

    def read(self) -> MaskNumbers:
        """All numbers on the host, in one transfer per device, and once until the next masking."""
        if self._numbers is None:
            values = to_host([*self.thresholds.values(), *self.selected.values()])
            thresholds = dict(zip(self.thresholds, values, strict=False))
            selected = dict(zip(self.selected, map(int, values[len(thresholds) :]), strict=True))
            self._numbers = MaskNumbers(thresholds, selected)
        return self._numbers

    def copy(self) -> "MaskStatistics":
        """The same numbers in a value of its own."""
        return MaskStatistics(dict(self.thresholds), dict(self.selected), dict(self.numel))

    def forget(self, names: Iterable[str]) -> None:
        """Drop what is known of some gradients."""
        self._numbers = None
        for name in names:
            for numbers in (self.thresholds, self.selected, self.numel):
                numbers.pop(name, None)

    def record(self, parts: Sequence[Part], counts: Sequence[Tensor], thresholds: Sequence[Tensor | None]) -> None:
        """Take in what was selected of some gradients."""
        self._numbers = None
        for part, count, threshold in zip(parts, counts, thresholds, strict=True):
            self.selected[part.name] = count
            self.numel[part.name] = part.numel
            if threshold is not None:
                self.thresholds[part.name] = threshold

    @property
    def density(self) -> float:
        """Fraction of the masked tensors' entries that stayed; 1.0 where nothing was masked."""
        total = sum(self.numel.values())
        return sum(self.read().selected.values()) / total if total else 1.0


def kth_largest_magnitude(tensor: Tensor, k: int) -> Tensor:
    """The k-th largest absolute value of a tensor, equal to what a full sort gives, bit for bit.

    Args:
        tensor: any shape and stride; float32, bfloat16 or float16.
        k: rank from the top, 1 (the largest) to ``tensor.numel()``.

    Returns:
        0-d tensor of the tensor's dtype, on its device. NaN ranks above infinity, as in ``torch.sort``.

    Raises:
        ValueError: if k is outside 1..numel.
        TypeError: if it is no tensor, or the dtype is not float32, bfloat16 or float16.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    check_dtype(tensor)
    if not 1 <= k <= tensor.numel():
        raise ValueError(f"k must be between 1 and the number of entries ({tensor.numel()}), got {k}")
    part = part_of(tensor)
    return find_thresholds([[(part.local, part)]], [k])[0].threshold


@torch.no_grad()
def mask_grads_(
    parameters: Tensor | Iterable[Tensor],
    density: float,
    *,
    scope: str = "tensor",
    score: str = "magnitude",
    error_if_nonfinite: bool = True,
    seed: int = 0,
    step: int = 0,
) -> MaskStatistics:
    r"""Zero, in place, all gradient entries but the fraction ``density`` with the largest score.

    With :math:`n` entries in the scope, :math:`k = \max(1, \lfloor \text{density} \cdot n \rfloor)` and
    :math:`T` the k-th largest score, an entry stays if its score is at least :math:`T` and not zero. Call it
    like ``torch.nn.utils.clip_grad_norm_``: after accumulation and clipping, right before the optimizer step.

    The gradient is zeroed, not the update: an optimizer with momentum or weight decay still moves weights
    whose gradient was zeroed.

    Args:
        parameters: a tensor or an iterable of tensors whose ``.grad`` is masked; those without are skipped.
            Gradients are float32, bfloat16 or float16, of any shape and stride, or sharded as DTensors.
        density: fraction of entries that stay, in (0, 1]; 1.0 changes nothing.
        scope: over what the top fraction is taken: each "tensor" by itself, or all together ("global").
        score: what entries are ranked by: "magnitude" of the gradient, "saliency" (magnitude of gradient
            times weight), or "random" (each entry stays with probability ``density``).
        error_if_nonfinite: raise if a gradient holds NaN or infinity, before any gradient is changed; on
            CUDA this waits for the device. With False, NaN ranks above infinity and passes through.
        seed: of the random score.
        step: which draw of the random score; give the optimizer step for a new selection at each.

    Returns:
        Thresholds, numbers of entries and of those that stayed, by the tensor's position ("0", "1", ...).

    Raises:
        ValueError: if density, scope or score is out of range.
        TypeError: if a gradient is sparse or of another dtype than float32, bfloat16 or float16.
        RuntimeError: for NaN or infinity, see ``error_if_nonfinite``.

    Example:
        >>> loss.backward()
        >>> mask_grads_(model.parameters(), density=0.2)
        >>> optimizer.step()
    """
    density, scope, score = check_density(density), check_scope(scope), check_score(score)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for p in parameters:
        if p.grad is not None:
            check_dtype(p.grad)
    parts = make_parts({str(i): p for i, p in enumerate(parameters)})
    ranking = make_score(score, seed, lambda name: step)
    titles = [f"parameter {part.name}" for part in parts]
    seen = [density < 1.0 and ranking.sees_nonfinite(part) for part in parts]
    if error_if_nonfinite and not all(seen):
        raise_for_flags(titles, nonfinite_gradients(parts))
    if density < 1.0:
        scopes = range(len(parts)) if scope == "tensor" else [0] * len(parts)
        selections: Sequence[Selection] = ranking.select(parts, density, scopes)
    else:
        selections = [WholeSelection(part) for part in parts]
    if error_if_nonfinite and all(seen):
        raise_for_flags(titles, [selection.nonfinite for selection in selections])
    statistics = MaskStatistics()
    statistics.record(parts, apply_(parts, selections), [selection.threshold for selection in selections])
    return statistics
