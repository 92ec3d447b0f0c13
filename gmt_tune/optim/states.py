"""Adam's moments in 32, 8 or 4 bits or fp8, of torchao's classes, and its arithmetic on pieces of them."""

import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.parts import is_sharded

# Small tensors keep 32 bits, as with bitsandbytes and torchao
_SMALLEST_QUANTIZED = 4096
_BLOCKS = {8: 256, 4: 128, "fp8": 256}  # entries that share a scale
_LARGEST_BLOCK = 256
STATE_BITS = (32, *_BLOCKS)
AGES_IN_16_BITS = 1 << 15  # that these tell apart, the last one for all that are older
PIECE = {"cpu": 1 << 16, "other": 1 << 22}  # entries updated at a time, whole blocks: bounds the passing memory


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
        return _zeros_of(OptimStateFp8, shape, block, device)
    return _zeros_of(OptimState8bit if state_bits == 8 else OptimState4bit, shape, signed, block, device)


def _zeros_of(kind: Any, *arguments: Any) -> Tensor:
    """In float32, which torchao before 0.16 has alone, and no argument for."""
    has_dtype = "dtype" in inspect.signature(kind.zeros).parameters
    return kind.zeros(*arguments, **({"dtype": torch.float32} if has_dtype else {}))


def empty(size: int, state_bits: int | str, *, signed: bool, device: torch.device) -> Tensor:
    """A 1-d moment with any values, of 32 or 8 bits as :func:`zeros` has it. Only the first waits for the device."""
    if state_bits == 32 or size < _SMALLEST_QUANTIZED or size % _BLOCKS[8]:
        return torch.empty(size, device=device)
    example: Any = _example(signed, device)
    codes = torch.empty(size, dtype=torch.uint8, device=device)
    scale = torch.empty(size // _BLOCKS[8], device=device)
    tensors = {"codes": codes, "scale": scale, "qmap": example.qmap}
    return type(example).__tensor_unflatten__(tensors, example.__tensor_flatten__()[1])


@functools.lru_cache(maxsize=8)
def _example(signed: bool, device: torch.device) -> Tensor:
    return zeros((_SMALLEST_QUANTIZED,), 8, signed=signed, device=device)


def own(state: Any) -> Any:
    """What this process holds of a moment, in the same memory: ``detach`` would copy torchao's table of codes."""
    return state.to_local() if is_sharded(state) else state


def is_quantized(state: Tensor) -> bool:
    """Whether a moment is of one of torchao's classes, which are made of several tensors."""
    return hasattr(state, "__tensor_flatten__")


def to_floats(state: Tensor) -> Tensor:
    """A moment in float32, or an age; the same memory where it is not quantized."""
    return state.dequantize() if is_quantized(state) else state


def read(state: Tensor, part: slice) -> Tensor:
    """Entries of a moment in float32, whole blocks: the same memory where it is, else as torchao dequantizes them."""
    if not is_quantized(state):
        return state[part]
    if not is_8bit(state):
        return state[part].dequantize()
    kind: Any = state
    codes, scale = kind.codes[part].int(), kind.scale[part.start // kind.block_size : part.stop // kind.block_size]
    return kind.qmap.index_select(0, codes).view(-1, kind.block_size).mul_(scale.view(-1, 1)).view(-1)


def read_near(state: Tensor, near: slice) -> tuple[Tensor, int]:
    """Entries of a moment in float32, those of a range and maybe some around it; and the number of the first one."""
    if not is_quantized(state):
        return state[near], near.start
    start = near.start // _LARGEST_BLOCK * _LARGEST_BLOCK
    stop = min(-(-near.stop // _LARGEST_BLOCK) * _LARGEST_BLOCK, state.numel())
    return read(state, slice(start, stop)), start


def write(state: Tensor, part: slice, values: Tensor) -> None:
    """Overwrite entries of a moment, whole blocks, as torchao quantizes them; ``values`` may be what ``read`` gave."""
    if not is_8bit(state):
        held = state[part]
        if is_quantized(state) or held.data_ptr() != values.data_ptr():
            held.copy_(values)
        return
    kind: Any = state
    blocks = values.view(-1, kind.block_size)
    scale = blocks.abs().amax(-1).clip_(1e-12)
    kind.codes[part] = _nearest_codes((blocks / scale.view(-1, 1)).view(-1), kind.signed)
    kind.scale[part.start // kind.block_size : part.stop // kind.block_size] = scale


def fill_(state: Tensor, values: Tensor) -> None:
    """Overwrite a moment, piece by piece."""
    for ((_, part),) in _pieces([values.numel()], _piece(values)):
        write(state, part, values[part])


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    ages: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    group: dict[str, Any],
    *,
    stochastic_round: bool,
) -> None:
    """One AdamW update of 1-d tensors, in place: small ones together, large ones piece by piece.

    Args:
        weights, grads: of any floating-point dtype; computed in float32.
        ages: how many updates each entry has seen with this one, of any dtype, or 0-d for all of a tensor.
        exp_avgs, exp_avg_sqs: moments, as :func:`zeros` makes them.
        group: the optimizer's parameter group.
        stochastic_round: round bfloat16 weights up or down by chance, so that small updates count on average.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(weights):
        by_dtype.setdefault(tensor.dtype, []).append(i)
    if len(by_dtype) > 1:  # what is rounded by chance, and what is not
        for members in by_dtype.values():
            given = ([tensors[i] for i in members] for tensors in (weights, grads, ages, exp_avgs, exp_avg_sqs))
            adamw_(*given, group, stochastic_round=stochastic_round)  # type: ignore[arg-type,misc]
        return
    for pieces in _pieces([tensor.numel() for tensor in weights], _piece(weights[0]) if weights else 1):
        w, g = (_join([tensors[i][part] for i, part in pieces]).float() for tensors in (weights, grads))
        m, v = (_join([read(moments[i], part) for i, part in pieces]) for moments in (exp_avgs, exp_avg_sqs))
        # Checkpoints may give them on the CPU
        steps = {i: ages[i].to(w.device) for i, _ in pieces if not ages[i].dim()}
        age = _join([steps[i].expand_as(weights[i][part]) if i in steps else ages[i][part] for i, part in pieces])
        _adamw_float32_(w, g, age.float(), m, v, group)
        if stochastic_round and weights[0].dtype == torch.bfloat16:
            from torchao.optim.quant_utils import _fp32_to_bf16_sr

            w = _fp32_to_bf16_sr(w)
        sizes = [part.stop - part.start for _, part in pieces]
        for (i, part), *values in zip(pieces, w.split(sizes), m.split(sizes), v.split(sizes), strict=True):
            for tensor, new in zip((weights[i], exp_avgs[i], exp_avg_sqs[i]), values, strict=True):
                write(tensor, part, new)


def _adamw_float32_(w: Tensor, g: Tensor, age: Tensor, m: Tensor, v: Tensor, group: dict[str, Any]) -> None:
    """The update of ``torchao.optim.adam.single_param_adam``, in place and in half as many passes.

    Bias corrections 1 - beta^age are made by ``expm1``: faster than a power, and exact at age 1 too.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    minus_correction1, minus_correction2 = (minus_correction(age, beta) for beta in (beta1, beta2))
    step = torch.div(v, minus_correction2).neg_().sqrt_().add_(group["eps"]).mul_(minus_correction1)
    step = torch.div(m, step, out=step).mul_(lr)  # below zero where the weight falls
    w.mul_(1 - lr * group["weight_decay"]).add_(step)


def minus_correction(age: Tensor, beta: float) -> Tensor:
    """-(1 - beta^age), of float32 ages."""
    return torch.expm1(age * (math.log(beta) if beta else -math.inf))


def counts_in_16_bits(betas: Sequence[float]) -> bool:
    """Whether ages of 16 bits will do: from 32,767 on, the bias correction of common betas is 1 in float32."""
    return max(betas) ** (AGES_IN_16_BITS - 1) < 2**-25


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def batches(sizes: Mapping[int, int], device: torch.device | None) -> Iterator[list[int]]:
    """Which of several tensors, by number, to update together: small ones, or one that is larger than a piece."""
    limit = PIECE["cpu" if device is None or device.type == "cpu" else "other"]
    batch: list[int] = []
    for i, size in sizes.items():
        if batch and sum(sizes[j] for j in batch) + size > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _pieces(sizes: Sequence[int], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """Ranges that cover tensors of these sizes, some of them together, at most so many entries at a time."""
    pieces: list[tuple[int, slice]] = []
    room = limit
    for i, size in enumerate(sizes):
        for start in range(0, size, limit):
            part = slice(start, min(start + limit, size))
            if pieces and part.stop - part.start > room:
                yield pieces
                pieces, room = [], limit
            pieces.append((i, part))
            room -= part.stop - part.start
    if pieces:
        yield pieces


def _piece(tensor: Tensor) -> int:
    return PIECE["cpu" if tensor.is_cpu else "other"]


# ---------------------------------------------------------------------- 8 bits by table


def is_8bit(state: Tensor) -> bool:
    return is_quantized(state) and type(state).__name__ == "OptimState8bit"


def _nearest_codes(values: Tensor, signed: bool) -> Tensor:
    """What ``torchao.optim.quant_utils.quantize_8bit_with_qmap`` gives, by looking up instead of searching."""
    _, lowest, next_from = code_table(signed, values.device)
    upper = (values.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    return lowest.index_select(0, upper).add_(values >= next_from.index_select(0, upper))


@functools.lru_cache(maxsize=8)
def code_table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The float32 value of each code; and for values with the same upper 16 bits their lowest code (uint8), and from
    where on it is the next one.

    There is no third one, because the codes lie farther apart than such values.
    """
    from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap

    qmap = torch.tensor(create_dynamic_map(signed), device="cpu")
    upper = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16

    def code(steps: Tensor) -> Tensor:
        return quantize_8bit_with_qmap(value(steps), qmap)

    def value(steps: Tensor) -> Tensor:
        """So many float32 above the lowest of those with the same upper bits."""
        return torch.where(upper < 0, upper + 0xFFFF - steps, upper + steps).view(torch.float32)

    low, high = torch.zeros_like(upper), torch.full_like(upper, 0xFFFF)
    lowest, changes = code(low), code(high) > code(low)
    while bool((low < high).any()):  # halve what is left, until it is the first value with the next code
        middle = (low + high) >> 1
        is_next = code(middle) > lowest
        low, high = torch.where(is_next, low, (middle + 1).minimum(high)), torch.where(is_next, middle, high)
    return qmap.to(device), lowest.to(device), torch.where(changes, value(high), math.inf).to(device)
