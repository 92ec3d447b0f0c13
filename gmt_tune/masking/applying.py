"""The applying step: zero, in place, what a threshold does not select."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from gmt_tune.masking.bits import (
    INFINITY_BITS,
    INT_DTYPE,
    MAGNITUDE_MASK,
    bits_to_float,
    blocks_of_each,
    magnitude_bits,
    smallest_selected_bits,
)
from gmt_tune.masking.devices import triton_search_for, try_triton
from gmt_tune.masking.saliency import Saliency

_BLOCK = {"cpu": 1 << 17, "other": 1 << 21}  # entries compared at a time: bounds the passing memory


def selection(score: Tensor, threshold: Tensor) -> Tensor:
    """Bool tensor of the score's shape: True where ``abs(score) >= threshold`` and the score is not zero.

    NaN ranks above everything: it is always selected, and a NaN threshold selects nothing else.
    """
    return magnitude_bits(score) >= smallest_selected_bits(threshold, score.dtype)


@torch.no_grad()
def apply_thresholds_(
    grads: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    scores: Sequence[Tensor | Saliency] | None = None,
    *,
    selected: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Zero, in place, every entry whose score lies below the threshold or is zero.

    On CUDA it does not wait for the device.

    Args:
        grads: gradients, changed in place.
        thresholds: one 0-d tensor for each gradient, as :func:`measure` returns them.
        scores: what was measured, where that is not the gradient itself.
        selected: how many entries stay, where :func:`measure` told; they need not be counted again.

    Returns:
        For each gradient a 0-d int64 tensor: how many entries stayed.
    """
    scores = grads if scores is None else scores
    counts: list[Tensor | None] = [None] * len(grads) if selected is None else list(selected)
    triton_search = triton_search_for(grads)
    by_kernels = []
    if triton_search is not None:
        pairs = enumerate(zip(grads, scores, strict=True))
        by_kernels = [i for i, (grad, score) in pairs if grad.numel() and triton_search.can_apply(grad, score)]
    if triton_search is not None and by_kernels:
        some = ([values[i] for i in by_kernels] for values in (grads, thresholds, scores))
        applied = try_triton(triton_search.apply_thresholds_, *some)
        if applied is None:
            by_kernels = []
        for i, count in zip(by_kernels, applied or (), strict=True):
            counts[i] = count
    done = set(by_kernels)
    for i, (grad, score) in enumerate(zip(grads, scores, strict=True)):
        if i in done:
            continue
        if score is not grad or grad.device.type != "cpu":
            counts[i] = _apply_score_(grad, score, thresholds[i])
        else:
            grad = grad.detach()
            # One vectorised operation: it zeroes what lies within [-lambd, lambd], so not NaN.
            torch.ops.aten.hardshrink.out(grad, _largest_dropped(thresholds[i], grad.dtype), out=grad)
            if counts[i] is None:
                counts[i] = torch.count_nonzero(grad.view(INT_DTYPE[grad.dtype]))
    return cast(list[Tensor], counts)  # each is there by now


def _largest_dropped(threshold: Tensor, dtype: torch.dtype) -> float:
    """The largest magnitude of ``dtype`` that is not selected; waits for the threshold's device."""
    if threshold.dtype == dtype:
        smallest = max(1, int(threshold.view(INT_DTYPE[dtype])) & MAGNITUDE_MASK[dtype])
    else:
        smallest = int(smallest_selected_bits(threshold, dtype))
    return bits_to_float(min(smallest - 1, INFINITY_BITS[dtype]), dtype)


def _apply_score_(grad: Tensor, score: Tensor | Saliency, threshold: Tensor) -> Tensor:
    smallest = smallest_selected_bits(threshold, score.dtype)
    count = torch.zeros((), dtype=torch.int64, device=grad.device)
    size = _BLOCK["cpu" if grad.device.type == "cpu" else "other"]
    factors = [score.grad, score.weight] if isinstance(score, Saliency) else [score]
    for grad_block, *score_blocks in blocks_of_each([grad, *factors], size):
        score_block = score_blocks[0] if len(score_blocks) == 1 else score_blocks[0] * score_blocks[1]
        bits = magnitude_bits(score_block)
        # Integers 0 and 1: multiplying the bits by them is faster than filling by a bool mask, and zeroes NaN.
        kept = torch.ge(bits, smallest, out=bits)
        count += kept.sum(dtype=torch.int32)
        grad_bits = grad_block.view(INT_DTYPE[grad.dtype])
        grad_bits.mul_(kept.to(grad_bits.dtype))
    return count
