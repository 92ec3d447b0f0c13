"""Bytes of what CompactAdamW holds: of selected entries, and of gradients that are whole until the optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gmt_tune.errors import UserError, one_line
from gmt_tune.masking.places import RUN, SEGMENT
from gmt_tune.masking.schedule import spread_turns
from gmt_tune.masking.scores import entries_to_keep
from gmt_tune.optim import CompactAdamW, states

_UPDATE_BYTES = 40  # of float32 copies of each entry that is updated at a time


@dataclass(frozen=True)
class CompactBytes:
    """Bytes on one device. Those of ``Places``, moments and ages are there from each tensor's first turn on.

    Attributes:
        states: moments and ages of selected entries, and the states of dense parameters.
        places: which entries are selected: 2 bytes each, or 1 bit an entry of the tensor, whichever is less.
        gradients: of selected entries of all tensors, and of dense parameters, in the gradient's dtype.
        whole: what the gradients of tensors that are due at one step need more, at the step where that is most.
        due: entries of these tensors.
        turns: how many turns tensors take.
        selected: entries that are selected, at most: fewer where most of a gradient is zero.
        selecting, updating: passing memory of the step's two halves: while selections are made, whole gradients are
            there; in the update, they are gone.
    """

    states: int
    places: int
    gradients: int
    whole: int
    due: int
    turns: int
    selected: int
    selecting: int
    updating: int


def compact_bytes(
    options: dict,
    numels: Mapping[str, int],
    shapes: Mapping[str, torch.Size],
    masked: set[str],
    density: float,
    refresh_every: int | None,
    dtype: torch.dtype,
) -> CompactBytes:
    """What a device holds with CompactAdamW.

    A device that holds a shard is taken to hold its share of the selected entries, too.

    Args:
        options: of the optimizer, besides the parameters.
        numels: entries of each trained parameter, by name.
        shapes: of these, as this device holds them.
        masked: names of those that are masked; the others are dense.
        density, refresh_every: of the mask.
        dtype: of weights and gradients.

    Raises:
        UserError: if the optimizer refuses its options.
    """
    parameter = nn.Parameter(torch.empty(1, dtype=dtype, device="meta"))
    try:
        optimizer = CompactAdamW([parameter], **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {one_line(error)}") from None
    age, bits, e = optimizer._age_dtype(parameter).itemsize, optimizer.state_bits, dtype.itemsize
    moments: dict[torch.Size, int] = {}

    def moments_of(shape: torch.Size) -> int:
        if shape not in moments:
            zeros = [states.zeros(shape, bits, signed=signed, device=torch.device("meta")) for signed in (True, False)]
            moments[shape] = sum(_bytes(state) for state in zeros)
        return moments[shape]

    dense = [shape for name, shape in shapes.items() if name not in masked]
    held = {name: shapes[name].numel() for name in sorted(masked)}
    kept = {name: entries_to_keep(n, density) if n else 0 for name, n in held.items()}
    sizes = {name: states.padded_size(k, bits) for name, k in kept.items()}
    places = {name: _places(n, kept[name]) for name, n in held.items()}
    turns = refresh_every or 1
    phases = spread_turns({name: numels[name] for name in numels if name in masked}, turns)
    by_turn: dict[int, list[str]] = {}
    for name, phase in phases.items():
        by_turn.setdefault(phase, []).append(name)
    due = max(by_turn.values(), key=lambda names: sum(held[name] - sizes[name] for name in names), default=[])
    largest = max((sizes[name] for name in due), default=0)
    # In float32, of one tensor at a time: new and old moments; and beside the places that were in force the new ones
    selecting = sum(e * sizes[name] + places[name] + (held[name] + 7) // 8 for name in due) + 2 * 4 * largest
    largest_of_all = max(sizes.values(), default=0)
    return CompactBytes(
        states=sum(moments_of(torch.Size([size])) + age * size for size in sizes.values())
        + sum(moments_of(shape) + 4 for shape in dense),
        places=sum(places.values()),
        gradients=e * (sum(sizes.values()) + sum(shape.numel() for shape in dense)),
        whole=e * sum(held[name] - sizes[name] for name in due),
        due=sum(numels[name] for name in due),
        turns=turns,
        selected=sum(kept.values()),
        selecting=selecting,
        updating=e * largest_of_all + _UPDATE_BYTES * min(largest_of_all, states.PIECE["other"]),
    )


def _places(n: int, kept: int) -> int:
    """Memory of what finds the selected ones of n entries: see :class:`gmt_tune.masking.places.Lookup`."""
    segments, bits = -(-n // SEGMENT), (n + 7) // 8
    return 8 * (segments + 1) + (2 * kept if 2 * kept < bits else bits + 2 * segments * SEGMENT // RUN)


def _bytes(state: Any) -> int:
    """Memory of a tensor, or of those that torchao's classes are made of."""
    if states.is_quantized(state):
        return sum(_bytes(getattr(state, name)) for name in state.__tensor_flatten__()[0])
    return state.numel() * state.element_size()
