"""What the masking functions refuse, said in one sentence: which key, which value, what would be right."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SCOPES = ("tensor", "global")
SCORES = ("magnitude", "saliency", "random")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_density(value: Any) -> float:
    """The density as a float, if it is a real number in (0, 1].

    Raises:
        ValueError: if it is not.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and 0 < value <= 1:
        return float(value)
    hint = f"; for {value} percent write {value / 100:g}" if is_number and 1 < value <= 100 else ""
    raise ValueError(
        f"density must be a number above 0 and at most 1 (0.2 keeps a fifth of the gradient's entries), "
        f"got {value!r}{hint}"
    )


def check_scope(value: object) -> str:
    """The scope, if it is one of ``SCOPES``; else raises ValueError."""
    return _check_choice("scope", value, SCOPES)


def check_score(value: object) -> str:
    """The name of a score, if it is one of ``SCORES``; else raises ValueError."""
    return _check_choice("score", value, SCORES)


def check_dtype(tensor: Any) -> None:
    """Raises TypeError unless the tensor (or saliency) is dense and float32, bfloat16 or float16."""
    if tensor.layout != torch.strided:
        raise TypeError("gradients must be dense, got a sparse one: set sparse=False on the embedding")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"gradients must be float32, bfloat16 or float16, got {tensor.dtype}")


def nonfinite_flags(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor a 0-d bool tensor on its device: whether it holds NaN or infinity. Does not wait."""
    return [_is_nonfinite(t.detach()) for t in tensors]


def _is_nonfinite(tensor: Tensor) -> Tensor:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    # On the CPU the sum is cheapest. It is not finite if an entry is not; but it can also overflow.
    if tensor.device.type == "cpu" and tensor.dtype != torch.float16 and tensor.sum().isfinite():
        return torch.tensor(False)
    return ~torch.stack(tensor.aminmax()).isfinite().all()  # both are NaN if an entry is


def raise_if_nonfinite(named_tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Raise if a gradient holds NaN or infinity; waits for the device.

    Args:
        named_tensors: what to check, by the name that the message shall give.
        where: what the message says behind the name, such as " at optimizer step 3".

    Raises:
        RuntimeError: names the first such gradient, how many others there are, and the way out.
    """
    raise_for_flags(list(named_tensors), nonfinite_flags(list(named_tensors.values())), where)


def raise_for_flags(names: Sequence[str], flags: Sequence[Any], where: str = "") -> None:
    """:func:`raise_if_nonfinite` for flags that were computed before, perhaps many steps ago."""
    if flags and all(isinstance(flag, Tensor) for flag in flags):
        flags = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # wait for the device once
    bad = [name for name, flag in zip(names, flags, strict=True) if flag]
    if not bad:
        return
    others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise RuntimeError(
        f"the gradient of '{bad[0]}'{others} holds NaN or infinity{where}: lower the learning rate or clip "
        "gradients, or set error_if_nonfinite to False to let such entries pass through"
    )


def _check_choice(key: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    return value
