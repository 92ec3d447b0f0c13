"""One AdamW step of the selected entries of many tensors: gathered, updated in float32, rounded and scattered.

    m <- m + (1 - beta1) (g - m)          v <- v + (1 - beta2) (g^2 - v)          age <- age + 1
    w <- decay w - lr m / ((sqrt(v / (1 - beta2^age)) + eps) (1 - beta1^age))

The arithmetic is that of ``states._adamw_float32_``, in its order; moments in 8 bits are read and written as torchao
does it, scale and code the same bit for bit. bfloat16 weights are rounded by chance as torchao's ``_fp32_to_bf16_sr``
does: random 16 bits are compared with those that are dropped.

What a launch covers is a table, int64 [columns, tensors], of sizes and addresses: ``_row`` makes that of a tensor. All
but weights begin at multiples of 16 bytes.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmt_tune.masking.places import RUN, SEGMENT, Lookup
from gmt_tune.masking.search.kernels.tables import to_device
from gmt_tune.optim.kernels.locate import last_at_most, locate
from gmt_tune.optim.kernels.moments import AGES, are_known, block_of, read, tensors_of, write
from gmt_tune.optim.kernels.tiles import load, rounded, store

TILE = 1 << 10  # entries that a program holds at a time, whole blocks of states: 4 a thread of 8 warps
TILES = 4

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Selected:
    """One tensor's selected entries, or all of a tensor, and what is known of them.

    Attributes:
        weight: contiguous.
        grad, exp_avg, exp_avg_sq: of the selected entries, and padding behind them. Moments are float32 tensors or
            both ``OptimState8bit``.
        age: of each of them; of all of a tensor 0-d float32, which counts this update already.
        lookup: where they are in the weight; None for all of a tensor.
        count: how many they are, above 0.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Any
    exp_avg_sq: Any
    age: Tensor
    lookup: Lookup | None
    count: int

    def kind(self) -> tuple:
        """Those of the same one are updated together."""
        dtypes = self.weight.dtype, self.grad.dtype, self.age.dtype
        places = "all" if self.lookup is None else "offsets" if self.lookup.ranks is None else "bits"
        return self.weight.device, *dtypes, places, block_of(self.exp_avg)


def can_update(member: Selected) -> bool:
    """Whether its dtypes, states and memory are those that the kernel knows."""
    moments, beside, age = (member.exp_avg, member.exp_avg_sq), [member.grad], member.age
    if member.lookup is None:
        is_known = age.dtype == torch.float32 and age.device == member.weight.device
    else:
        is_known = age.dtype in AGES and age.numel() == member.grad.numel()
        beside += [age, member.lookup.stored]
    return (
        is_known
        and member.weight.dtype in _DTYPES
        and member.grad.dtype in _DTYPES
        and member.weight.is_contiguous()
        and are_known(moments, beside, TILE)
        and {moment.numel() for moment in moments} == {member.grad.numel()}
    )


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0: near 0 by the series, without terms below 2^-26 of the sum."""
    series = x * 0 + 1
    for i in tl.static_range(7):
        series = 1 + series * (x * (1.0 / (8 - i)))
    return tl.where(x > -0.5, series * x, tl.exp(x) - 1)


@triton.jit
def _lerp(start, end, weight):
    """As ``torch.lerp``, which is exact at both ends."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1), end - start, tl.where(near, start, end))


@triton.jit
def _round_by_chance(values, random):
    """float32 that bfloat16 can hold, of which random bits choose the upper or the lower one."""
    bits = values.to(tl.int32, bitcast=True)
    towards_zero = bits & -65536
    chosen = tl.where((random & 0xFFFF).to(tl.int32) < (bits & 0xFFFF), towards_zero + 65536, towards_zero)
    return chosen.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tensors"])
def _update_kernel(
    table, tensors, first_qmap, second_qmap, seed, lr, decay, weight1, weight2, log_beta1, log_beta2, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, AGE: tl.constexpr, OLDEST: tl.constexpr,
    IS_WHOLE: tl.constexpr, IS_SPARSE: tl.constexpr, BLOCK: tl.constexpr, BY_CHANCE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr, SEGMENT: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor = table + last_at_most(table, chunk * 0, tensors.to(tl.int64) - 1, chunk)
    first_chunk = tl.load(tensor)
    count = tl.load(tensor + tensors)
    size = tl.load(tensor + 2 * tensors)
    segments = tl.load(tensor + 3 * tensors)
    weight = tl.load(tensor + 4 * tensors).to(tl.pointer_type(WEIGHT))
    grad = tl.multiple_of(tl.load(tensor + 5 * tensors).to(tl.pointer_type(GRAD)), 16)
    age = tl.load(tensor + 6 * tensors).to(tl.pointer_type(AGE))
    stored = tl.multiple_of(tl.load(tensor + 7 * tensors).to(tl.pointer_type(tl.int16)), 16)
    starts = tl.load(tensor + 8 * tensors).to(tl.pointer_type(tl.int64))
    ranks = tl.load(tensor + 9 * tensors).to(tl.pointer_type(tl.int16))
    first = tl.multiple_of(tl.load(tensor + 10 * tensors).to(tl.pointer_type(STATE)), 16)
    second = tl.multiple_of(tl.load(tensor + 11 * tensors).to(tl.pointer_type(STATE)), 16)
    first_scale = tl.load(tensor + 12 * tensors).to(tl.pointer_type(tl.float32))
    second_scale = tl.load(tensor + 13 * tensors).to(tl.pointer_type(tl.float32))
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
        decay = tl.load(decay).to(tl.float32)
    for i in range(TILES):
        start = (chunk - first_chunk) * (TILE * TILES) + i * TILE
        if start < count:
            room = tl.minimum(size - start, TILE).to(tl.int32)
            if IS_WHOLE:
                index = start + tl.arange(0, TILE)
                there = index < count
                ages = tl.load(age)
            else:
                index, there = locate(start, count, stored, starts, ranks, segments, IS_SPARSE, SEGMENT, RUN, TILE)
                own = tl.multiple_of(age, 16) + start
                ages = tl.minimum(load(own, room, 0, TILE).to(tl.int32), OLDEST - 1) + 1
                store(own, ages.to(AGE), room, TILE)
            w = tl.load(weight + index, mask=there, other=0.0).to(tl.float32)
            g = load(grad + start, room, 0.0, TILE).to(tl.float32)
            m = _lerp(read(first, first_scale, first_qmap, start, room, BLOCK, TILE), g, weight1)
            v = _lerp(read(second, second_scale, second_qmap, start, room, BLOCK, TILE), g * g, weight2)
            write(first, first_scale, first_qmap, m, start, room, BLOCK, TILE)
            write(second, second_scale, second_qmap, v, start, room, BLOCK, TILE)
            # Below zero, as expm1 gives both corrections
            minus_correction1 = _expm1(ages.to(tl.float32) * log_beta1)
            minus_correction2 = _expm1(ages.to(tl.float32) * log_beta2)
            step = (tl.sqrt_rn(-tl.div_rn(v, minus_correction2)) + eps) * minus_correction1
            w = w * decay + tl.div_rn(m, step) * lr
            if BY_CHANCE:
                # A number of its own for each entry of the launch
                offsets = (chunk * (TILE * TILES) + i * TILE + tl.arange(0, TILE)).to(tl.uint32)
                w = _round_by_chance(w, tl.randint(tl.load(seed), offsets))
            tl.store(weight + index, rounded(w, WEIGHT), mask=there)


def update_(members: Sequence[Selected], group: dict[str, Any], *, stochastic_round: bool) -> None:
    """Update tensors of one kind, which ``can_update``, in one launch. Does not wait for the device.

    Args:
        members: the tensors.
        group: the optimizer's parameter group; ``lr`` may be a tensor on their device or on the CPU.
        stochastic_round: round bfloat16 weights by chance, of which PyTorch's generator of the device is the source.
    """
    device, weight_dtype, grad_dtype, age_dtype, places, block = members[0].kind()
    (beta1, beta2), lr = group["betas"], group["lr"]
    decay = 1 - lr * group["weight_decay"]
    lr_on_device = isinstance(lr, Tensor) and lr.device == device
    if not lr_on_device:
        lr, decay = float(lr), float(decay)
    by_chance = stochastic_round and weight_dtype == torch.bfloat16
    chunks = [0, *itertools.accumulate(-(-member.count // (TILE * TILES)) for member in members)]
    rows = [[first, *_row(member)] for first, member in zip(chunks, members, strict=False)]
    table = to_device([value for column in zip(*rows, strict=True) for value in column], device)
    seed = torch.randint(1 << 62, (1,), dtype=torch.int64, device=device) if by_chance else table
    qmaps = (members[0].exp_avg.qmap, members[0].exp_avg_sq.qmap) if block else (table, table)
    _update_kernel[(chunks[-1],)](
        table, len(members), *qmaps, seed, lr, decay, 1.0 - beta1, 1.0 - beta2, _log(beta1), _log(beta2),
        float(group["eps"]), WEIGHT=_DTYPES[weight_dtype], GRAD=_DTYPES[grad_dtype],
        STATE=tl.uint8 if block else tl.float32, AGE=AGES.get(age_dtype, tl.float32),
        OLDEST=torch.iinfo(age_dtype).max if age_dtype in AGES else 0,
        IS_WHOLE=places == "all", IS_SPARSE=places == "offsets", BLOCK=block, BY_CHANCE=by_chance,
        LR_ON_DEVICE=lr_on_device, SEGMENT=SEGMENT, RUN=RUN,
        TILE=TILE, TILES=TILES, num_warps=8,
    )  # fmt: skip


def _row(member: Selected) -> list[int]:
    """A row of the table, behind the number of the first chunk."""
    stored, starts, ranks = member.lookup or (member.weight, member.weight, None)
    tensors = [member.weight, member.grad, member.age, stored, starts, starts if ranks is None else ranks]
    tensors += tensors_of([member.exp_avg, member.exp_avg_sq])
    return [member.count, member.grad.numel(), starts.numel() - 1, *(tensor.data_ptr() for tensor in tensors)]


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
