"""Which tensors Triton's kernels handle: those on a GPU, where Triton is installed."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import ModuleType

from torch import Tensor

from gmt_tune.masking.saliency import Saliency


def triton_search_for(members: Iterable[Tensor | Saliency]) -> ModuleType | None:
    """The module ``triton_search`` where it serves all these tensors' devices, else None."""
    members = list(members)
    if not members or any(m.device.type != "cuda" for m in members):
        return None
    return load_triton_search()


@functools.cache
def load_triton_search() -> ModuleType | None:
    """None where Triton is not installed, as with PyTorch for Windows or the CPU."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from gmt_tune.masking import triton_search

    return triton_search
