"""CompactAdamW's update on the CPU, in one pass over each tensor, by C++."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking import native
from gmt_tune.masking.places import Places, all_places
from gmt_tune.optim import states

_SOURCE = Path(__file__).with_name("adamw.cpp")
_AGES = 1 << 15  # that 16 bits tell apart


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "decay", "rest1", "rest2", "eps")),
        *((name, ctypes.c_void_p) for name in ("minus_correction1", "minus_correction2")),
        ("seed", ctypes.c_int64),
    )


class _Moment(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("values", "codes", "scale", "qmap", "lowest", "next_from"))


@torch.no_grad()
def update_(
    entries: Tensor,
    grads: Tensor,
    places: Places | None,
    age: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    group: dict[str, Any],
    seed: int | None,
) -> bool:
    """One AdamW update of the selected entries of a tensor, in place, if it can be had here.

    Args:
        entries: of the tensor, selected or not.
        grads: of the selected ones, 1-d, with padding behind them as their states have.
        places: of the selected ones; None where all are.
        age: of each of the selected ones, counted up; or 0-d, how many updates all have seen with this one.
        exp_avg, exp_avg_sq: their moments, 1-d.
        group: the optimizer's parameter group.
        seed: of stochastic rounding; None rounds weights to the nearest.

    Returns:
        Whether it was done: contiguous tensors on the CPU, bfloat16 or float32, states of 32 or 8 bits, and a C++
        compiler.
    """
    moments = [moment for moment in (_moment(exp_avg, True), _moment(exp_avg_sq, False)) if moment is not None]
    ages = age if age.dim() else None
    is_served = len(moments) == 2 and native.serves(entries, grads, age)
    if not is_served or (ages is not None and age.dtype != torch.int16):
        return False
    library = native.load(_SOURCE) if {entries.dtype, grads.dtype} <= set(native.FLOATS) else None
    if library is None:
        return False
    betas = group["betas"]
    corrections = [states.minus_correction(age.float(), b) if ages is None else _corrections(b) for b in betas]
    lr, rests = float(group["lr"]), (1 - beta for beta in betas)
    seed = -1 if seed is None else seed
    numbers = _Group(
        lr, 1 - lr * group["weight_decay"], *rests, group["eps"], *(each.data_ptr() for each in corrections), seed
    )
    found = all_places(entries.numel()) if places is None else places.native()
    library.adamw(
        *(found, native.pointer(entries), entries.element_size()),
        *(native.pointer(grads), grads.element_size(), None if ages is None else native.pointer(ages)),
        *(*map(ctypes.byref, moments), ctypes.c_int64(grads.numel()), ctypes.byref(numbers), torch.get_num_threads()),
    )
    torch.autograd.graph.increment_version(entries)  # autograd notices, as with PyTorch's own operations
    return True


@functools.lru_cache(maxsize=8)
def _corrections(beta: float) -> Tensor:
    """Of each age from 0 on."""
    return states.minus_correction(torch.arange(_AGES, dtype=torch.float32), beta)


def _moment(state: Tensor, signed: bool) -> ctypes.Structure | None:
    """What C++ sees of a moment; None where it is of a kind that it does not know."""
    if native.serves(state):
        return _Moment(state.data_ptr()) if state.dtype == torch.float32 else None
    if not states.is_8bit(state):
        return None
    kind: Any = state
    parts = (kind.codes, kind.scale, kind.qmap, *states.code_table(signed, kind.codes.device))
    return _Moment(None, *(part.data_ptr() for part in parts)) if native.serves(*parts) else None
