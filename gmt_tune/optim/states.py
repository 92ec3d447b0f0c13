"""Adam's moments in 32, 8 or 4 bits or fp8, of torchao's classes, and its arithmetic on pieces of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Small tensors keep 32 bits, as with bitsandbytes and torchao
_SMALLEST_QUANTIZED = 4096
_BLOCKS = {8: 256, 4: 128, "fp8": 256}  # entries that share a scale
STATE_BITS = (32, *_BLOCKS)
_PIECE = {"cpu": 1 << 16, "other": 1 << 22}  # entries updated at a time, whole blocks: bounds the passing memory


def padded_size(n: int, state_bits: int | str) -> int:
    """The size of states of n entries, whole blocks where they are quantized; at least 1."""
    block = _BLOCKS.get(state_bits, 1) if n >= _SMALLEST_QUANTIZED else 1
    return max(1, -(-n // block) * block)


def zeros(shape: Sequence[int], state_bits: int | str, *, signed: bool, device: torch.device) -> Tensor:
    """A moment; of 32 bits where it has few entries or is no number of whole blocks."""
    n, block = math.prod(shape), _BLOCKS.get(state_bits)
    if block is None or n < _SMALLEST_QUANTIZED or n % block:
        return torch.zeros(shape, device=device)
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    if state_bits == "fp8":
        return OptimStateFp8.zeros(shape, block, device, dtype=torch.float32)
    kind: Any = OptimState8bit if state_bits == 8 else OptimState4bit
    return kind.zeros(shape, signed, block, device, dtype=torch.float32)


def to_floats(state: Tensor) -> Tensor:
    """A moment in float32; the same memory where it is."""
    return state if type(state) is Tensor else state.dequantize()


def fill_(state: Tensor, values: Tensor) -> None:
    """Overwrite a moment, piece by piece."""
    size = _piece(values)
    for start in range(0, values.numel(), size):
        state[start : start + size].copy_(values[start : start + size])


@torch.no_grad()
def adamw_(
    weights: Tensor,
    grad: Tensor,
    ages: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    group: dict[str, Any],
    *,
    stochastic_round: bool,
) -> None:
    """One AdamW update of 1-d tensors of one size, in place.

    Args:
        weights, grad: of any floating-point dtype; computed in float32.
        ages: how many updates each entry has seen with this one, of any dtype, or 0-d for all.
        exp_avg, exp_avg_sq: moments, as :func:`zeros` makes them.
        group: the optimizer's parameter group.
        stochastic_round: round bfloat16 weights up or down by chance, so that small updates count on average.
    """
    from torchao.optim.adam import single_param_adam

    size = _piece(weights)
    for start in range(0, weights.numel(), size):
        part = slice(start, start + size)
        single_param_adam(
            weights[part],
            grad[part],
            (ages[part] if ages.dim() else ages).float(),
            exp_avg[part],
            exp_avg_sq[part],
            None,
            group["lr"],
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,
            stochastic_round and weights.dtype == torch.bfloat16,
        )


def _piece(tensor: Tensor) -> int:
    return _PIECE["cpu" if tensor.is_cpu else "other"]
