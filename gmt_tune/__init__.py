"""Gradient-Mask Tuning: only the largest entries of the accumulated gradient reach the optimizer.

Public names are resolved on first use, so that importing this package (which PyTorch's autoload does
while torch itself is still being imported) costs nothing and imports nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gmt_tune._version import __version__

if TYPE_CHECKING:
    from gmt_tune.masking import GradientMask, MaskNumbers, MaskStatistics, kth_largest_magnitude, mask_grads_
    from gmt_tune.optim import CompactAdamW

__all__ = [
    "CompactAdamW",
    "GradientMask",
    "MaskNumbers",
    "MaskStatistics",
    "__version__",
    "kth_largest_magnitude",
    "mask_grads_",
]


def __getattr__(name: str):
    if name in __all__:
        value = getattr(import_module("gmt_tune.optim" if name == "CompactAdamW" else "gmt_tune.masking"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gmt_tune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
