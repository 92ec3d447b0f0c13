"""Gradient-Mask Tuning: update only the entries whose accumulated gradient is largest in magnitude.

Public names are resolved on first use, so that importing this package (which PyTorch's autoload does
while torch itself is still being imported) costs nothing and imports nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gmt_tune._version import __version__

if TYPE_CHECKING:
    from gmt_tune.masking import GradientMask, MaskStatistics, kth_largest_magnitude, mask_grads_

_PUBLIC = {
    "GradientMask": "gmt_tune.masking",
    "MaskStatistics": "gmt_tune.masking",
    "kth_largest_magnitude": "gmt_tune.masking",
    "mask_grads_": "gmt_tune.masking",
}

__all__ = ["GradientMask", "MaskStatistics", "__version__", "kth_largest_magnitude", "mask_grads_"]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gmt_tune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
