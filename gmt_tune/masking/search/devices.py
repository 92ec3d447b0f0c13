"""Which tensors Triton's kernels handle: those on a GPU, where Triton is installed and works."""

import functools
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.search.entries import Product

_SERVED = ("cuda",)  # device types that Triton compiles for here


def is_served(device: torch.device) -> bool:
    """Whether Triton's kernels are meant for a device, whether or not they work here."""
    return device.type in _SERVED


def kernels_for(members: Iterable[Tensor | Product]) -> ModuleType | None:
    """The module ``triton`` beside this one where its kernels serve all these tensors, else None.

    Triton is not installed with PyTorch for Windows or the CPU, for example, and may have failed before.
    """
    devices = {member.device for member in members}
    return _import_kernels() if devices and not _failures and all(map(is_served, devices)) else None


def try_triton(run: Callable, *arguments: Any) -> Any:
    """What a function that launches Triton's kernels returns, or None if they cannot be compiled or launched.

    A Triton that is installed can still be too old, or lack a C compiler. A warning says so once, and from then on
    thresholds are found without it. Repeating elsewhere what was done in part is safe: a selection that was applied
    is not changed by applying it again.
    """
    try:
        return run(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _give_up(error)
        return None


# What the first error of Triton in this process said: it is not tried again. The error itself would keep all tensors
# alive that were on the way to it.
_failures: list[str] = []


def _give_up(error: Exception) -> None:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    _failures.append(f"{type(error).__name__}: {reason}")
    warnings.warn(
        f"Triton is installed but does not work here ({_failures[-1]}): gradient masks use PyTorch's "
        "own operations, which select the same entries more slowly. A C compiler, or the Triton release that came with "
        f"torch {torch.__version__}, is what is usually missing.",
        stacklevel=3,
    )


@functools.cache
def _import_kernels() -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    try:
        from gmt_tune.masking.search import triton as kernels
    except Exception as error:  # a release that lacks what the kernels use
        _give_up(error)
        return None
    return kernels
