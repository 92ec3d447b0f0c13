"""CompactAdamW's update on the CPU, in one pass over all tensors, by C++."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking import native
from gmt_tune.masking.places import NativePlaces, Places
from gmt_tune.optim import states

_SOURCE = Path(__file__).with_name("adamw.cpp")
# Entries, gradient of the selected ones (padded as their states are), state, and places; None where all are selected
Member = tuple[Tensor, Tensor, dict[str, Any], Places | None]


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "decay", "rest1", "rest2", "eps")),
        *((name, ctypes.c_void_p) for name in ("minus_correction1", "minus_correction2")),
    )


class _Moment(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("values", "codes", "scale", "qmap", "lowest", "next_from"))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("places", NativePlaces),
        *((name, ctypes.c_void_p) for name in ("weights", "grads", "ages", "step")),
        *((name, _Moment) for name in ("first_moment", "second_moment")),
        *((name, ctypes.c_int64) for name in ("size", "seed")),
        *((name, ctypes.c_int32) for name in ("weight_bytes", "grad_bytes")),
    )


@torch.no_grad()
def update_(members: Sequence[Member], group: dict[str, Any], *, stochastic_round: bool) -> list[int]:
    """One AdamW update of what C++ serves, in place.

    That are contiguous tensors on the CPU, bfloat16 or float32, with states of 32 or 8 bits. Their ages are counted up;
    where all entries are selected, ``step`` was before.

    Args:
        members: of one group. Their entries, gradients and moments are of any shape.
        group: the optimizer's parameter group.
        stochastic_round: round bfloat16 weights up or down by chance, so that small updates count on average.

    Returns:
        Positions of the members that are still to be updated.
    """
    seeds = torch.randint(1 << 62, (len(members),), device="cpu").tolist() if stochastic_round else [-1] * len(members)
    seen = {i: _tensor(*member, seed) for i, (member, seed) in enumerate(zip(members, seeds, strict=True))}
    given = {i: tensor for i, tensor in seen.items() if tensor is not None}
    betas = group["betas"]
    library = native.load(_SOURCE) if given and states.counts_in_16_bits(betas) else None
    if library is None:
        return list(range(len(members)))
    lr = float(group["lr"])  # waits for the device where it is on one
    corrections = (_corrections(beta).data_ptr() for beta in betas)
    numbers = _Group(lr, 1 - lr * group["weight_decay"], *(1 - beta for beta in betas), group["eps"], *corrections)
    tensors = (_Tensor * len(given))(*given.values())
    library.adamw(tensors, ctypes.c_int64(len(given)), ctypes.byref(numbers), torch.get_num_threads())
    torch.autograd.graph.increment_version([members[i][0] for i in given])  # as PyTorch's own operations do
    return [i for i in range(len(members)) if i not in given]


def _tensor(entries: Tensor, grads: Tensor, state: dict[str, Any], places: Places | None, seed: int) -> _Tensor | None:
    """What C++ sees of a member; None where it does not serve it."""
    age = state["step" if places is None else "age"]
    is_float = entries.dtype in native.FLOATS and grads.dtype in native.FLOATS
    if not is_float or age.dtype not in (torch.int16, torch.float32) or not native.serves(entries, grads, age):
        return None
    moments = _moment(states.own(state["exp_avg"]), True), _moment(states.own(state["exp_avg_sq"]), False)
    if None in moments:
        return None
    found = NativePlaces(None, None, None, 0, entries.numel()) if places is None else places.native()
    ages = (None, age.data_ptr()) if places is None else (age.data_ptr(), None)
    pointers = entries.data_ptr(), grads.data_ptr(), *ages
    return _Tensor(found, *pointers, *moments, grads.numel(), seed, entries.element_size(), grads.element_size())


@functools.lru_cache(maxsize=8)
def _corrections(beta: float) -> Tensor:
    """Of each age from 0 on."""
    return states.minus_correction(torch.arange(states.AGES_IN_16_BITS, dtype=torch.float32, device="cpu"), beta)


def _moment(state: Tensor, signed: bool) -> tuple | None:
    """What C++ sees of a moment; None where it is of a kind that it does not know."""
    if native.serves(state):
        return (state.data_ptr(),) if state.dtype == torch.float32 else None
    if not states.is_8bit(state):
        return None
    kind: Any = state
    parts = (kind.codes, kind.scale, *states.code_table(signed, kind.codes.device))
    return (None, *(part.data_ptr() for part in parts)) if native.serves(*parts) else None
