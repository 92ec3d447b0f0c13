"""Exact selection of the largest magnitudes, without sorting, at about the speed of memory.

What is selected: of n entries, k = max(1, floor(density * n)); T is the k-th largest magnitude; an entry stays
if its magnitude is at least T and not zero. NaN ranks above infinity.

How T is found, and why it is exact: the magnitude of an IEEE float orders like the integer of its bits
without the sign. T is therefore the one integer t with #(bits > t) < k <= #(bits >= t), and counting proves
it; nothing is rounded, sorted or copied. Which t to count for is the only question, and the answer differs:

- on the CPU, a sample guesses t, and a few counts correct the guess (``cpu_search``);
- on a GPU with Triton, the same for all tensors in a few launches (``triton_search``);
- elsewhere, where a tensor's memory has gaps, and where tensors are sharded, t is found digit by digit
  (``histogram``).

The measuring step (``measuring``) and the applying step (``applying``) are separate functions, and between
optimizer steps nothing is kept. This module is the interface to all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmt_tune.masking.applying import apply_thresholds_, selection
from gmt_tune.masking.checks import (
    SCOPES,
    SCORES,
    check_density,
    check_dtype,
    check_scope,
    check_score,
    nonfinite_flags,
    raise_for_flags,
    raise_if_nonfinite,
)
from gmt_tune.masking.dtensor import any_sharded
from gmt_tune.masking.measuring import (
    Measurement,
    entries_to_keep,
    kth_largest_magnitude,
    measure,
    measure_thresholds,
)
from gmt_tune.masking.packing import apply_packed_, pack_selected, pack_selection, unpack_selection
from gmt_tune.masking.random_selection import apply_random_, random_key, random_selection
from gmt_tune.masking.saliency import Saliency

__all__ = [
    "SCOPES",
    "SCORES",
    "MaskStatistics",
    "Measurement",
    "Saliency",
    "apply_packed_",
    "apply_random_",
    "apply_thresholds_",
    "check_density",
    "check_dtype",
    "check_scope",
    "check_score",
    "entries_to_keep",
    "kth_largest_magnitude",
    "mask_grads_",
    "measure",
    "measure_thresholds",
    "nonfinite_flags",
    "pack_selected",
    "pack_selection",
    "raise_for_flags",
    "raise_if_nonfinite",
    "random_key",
    "random_selection",
    "selection",
    "unpack_selection",
]


@dataclass
class MaskStatistics:
    """What one masking did. Holds 0-d tensors on the device; reading a property waits for the device.

    Attributes:
        thresholds: name (or position) of each tensor to its 0-d threshold; empty for score "random".
        selected: name to a 0-d int64 tensor: entries that stayed.
        numel: name to the number of entries.
    """

    thresholds: dict[str, Tensor] = field(default_factory=dict)
    selected: dict[str, Tensor] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Fraction of the masked tensors' entries that stayed; 1.0 where nothing was masked."""
        total = sum(self.numel.values())
        by_device: dict[torch.device, list[Tensor]] = {}
        for count in self.selected.values():
            by_device.setdefault(count.device, []).append(count)
        kept = sum(int(torch.stack(counts).sum()) for counts in by_device.values())
        return kept / total if total else 1.0


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
    named = {str(i): p for i, p in enumerate(parameters) if p.grad is not None}
    grads = [p.grad for p in named.values() if p.grad is not None]
    for grad in grads:
        check_dtype(grad)
    if any_sharded(grads):
        from gmt_tune.masking import sharded

        return sharded.mask_grads_(named, density, scope, score, error_if_nonfinite, seed, step)
    statistics = MaskStatistics(numel={name: grad.numel() for name, grad in zip(named, grads, strict=True)})
    labels = [f"parameter {name}" for name in named]
    ranks_gradients = score == "magnitude" and density < 1.0
    if error_if_nonfinite and not ranks_gradients:
        raise_if_nonfinite(dict(zip(labels, grads, strict=True)))
    if density == 1.0:
        statistics.selected = {name: torch.tensor(n) for name, n in statistics.numel.items()}
    elif ranks_gradients:
        measured = measure(grads, density, scope)
        if error_if_nonfinite:
            raise_for_flags(labels, measured.nonfinite)
        counts = apply_thresholds_(grads, measured.thresholds, selected=measured.selected)
        statistics.thresholds = dict(zip(named, measured.thresholds, strict=True))
        statistics.selected = dict(zip(named, counts, strict=True))
    elif score == "random":
        for name, grad in zip(named, grads, strict=True):
            statistics.selected[name] = apply_random_(grad, density, random_key(seed, step, name))
    else:
        scores = [Saliency(grad, p) for grad, p in zip(grads, named.values(), strict=True)]
        thresholds = measure_thresholds(scores, density, scope)
        counts = apply_thresholds_(grads, thresholds, scores)
        statistics.thresholds = dict(zip(named, thresholds, strict=True))
        statistics.selected = dict(zip(named, counts, strict=True))
    return statistics
