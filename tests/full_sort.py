"""The independent answer to what the mask selects: a full sort of all magnitudes, in NumPy-like plainness."""

import math

import torch


def kth_largest(tensors: list[torch.Tensor], k: int) -> torch.Tensor:
    """float32, which holds every float32, bfloat16 and float16; NaN ranks above infinity."""
    magnitudes = torch.cat([t.detach().abs().reshape(-1).to(torch.float32) for t in tensors])
    return magnitudes.sort(descending=True).values[k - 1]


def selected(tensor: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    magnitude = tensor.detach().abs().to(torch.float32)
    return magnitude.isnan() | ((magnitude >= threshold) & (magnitude > 0))


def mask(tensors: list[torch.Tensor], density: float, scope: str = "tensor", scores=None) -> list[torch.Tensor]:
    """Masked copies."""
    scores = tensors if scores is None else scores
    groups = [scores] if scope == "global" else [[s] for s in scores]
    thresholds = []
    for group in groups:
        n = sum(s.numel() for s in group)
        threshold = kth_largest(group, max(1, math.floor(density * n))) if n else torch.tensor(math.inf)
        thresholds += [threshold] * len(group)
    return [
        torch.where(selected(s, threshold), t, torch.zeros_like(t))
        for t, s, threshold in zip(tensors, scores, thresholds, strict=True)
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also for NaN, and telling zero from negative zero."""
    ints = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))
