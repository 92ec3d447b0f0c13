"""What Triton's kernels do of a compact step, where they serve its tensors. What is left, the caller does by torch.

Each launch is tried by itself: an update is not to be made twice, and where a kernel cannot be compiled or launched,
nothing has changed yet.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.places import Places
from gmt_tune.masking.search.devices import kernels_for, try_triton
from gmt_tune.optim import states

Taken = tuple[Tensor, Tensor]  # selected entries of gradients, 1-d, and whether these held NaN or infinity, 0-d bool
# Of a new selection: the state, to be replaced; places before, if there were any, and now; and the gradient of these
Turn = tuple[dict[str, Any], Places | None, Places, Tensor]
Member = tuple[Tensor, Tensor, dict[str, Any], Places]  # entries, gradient of the selected ones, state and places


def gather(places: Places, grad: Tensor, size: int, held: Taken | None = None, *, checks: bool = True) -> Taken | None:
    """The selected entries of a gradient, with zeros behind them up to a size, in one launch.

    Args:
        places: of the selected entries.
        grad: the gradient, of whatever device, dtype and strides.
        size: at least ``places.count``.
        held: what this gave for the gradients before, to which this one is added in place.
        checks: whether to look for NaN and infinity.

    Returns:
        None if the kernels do not serve this gradient.
    """
    kernels = kernels_for([grad])
    return None if kernels is None else try_triton(_gather, kernels, places, grad, size, held, checks)


def update_(members: Sequence[Member], group: dict[str, Any], *, stochastic_round: bool) -> list[int]:
    """Update selected entries in a launch for each kind of state and dtype.

    Args:
        members: each on one device.
        group: the optimizer's parameter group.
        stochastic_round: as of ``states.adamw_``.

    Returns:
        Positions of the members that are still to be updated.
    """
    left = set(range(len(members)))
    served = [i for i in left if kernels_for([members[i][0]]) is not None]
    kinds = (try_triton(_by_kind, members, served) if served else None) or []
    for numbers, selected in kinds:
        kernels = kernels_for([selected[0].weight])
        if kernels is not None and try_triton(_update, kernels, selected, group, stochastic_round):
            left.difference_update(numbers)
    return sorted(left)


def carry_(turns: Sequence[Turn], state_bits: int | str, age_dtypes: Sequence[torch.dtype]) -> list[int]:
    """Carry the states of entries that stay selected over to new selections, in a launch for each kind of state.

    Args:
        turns: whose states, "exp_avg", "exp_avg_sq" and "age", are replaced; those of new entries begin at zero.
        state_bits: of the moments.
        age_dtypes: of the ages.

    Returns:
        Positions of those that are still as they were.
    """
    left = set(range(len(turns)))
    served = [i for i in left if kernels_for([turns[i][3]]) is not None] if state_bits in (32, 8) else []
    kinds = (try_triton(_carries_by_kind, turns, state_bits, age_dtypes, served) if served else None) or []
    for numbers, pairs in kinds:
        kernels = kernels_for([pairs[0][1].age])
        if kernels is not None and try_triton(_carry, kernels, pairs):
            for i, (_, new) in zip(numbers, pairs, strict=True):
                turns[i][0].update(exp_avg=new.exp_avg, exp_avg_sq=new.exp_avg_sq, age=new.age)
            left.difference_update(numbers)
    return sorted(left)


def _gather(
    kernels: ModuleType, places: Places, grad: Tensor, size: int, held: Taken | None, checks: bool
) -> Taken | None:
    from gmt_tune.optim.kernels.gather import can_gather, gather_

    if places.count == 0 or not can_gather(grad, places.lookup, None if held is None else held[0]):
        return None
    with kernels.on_device(grad.device):
        values, flag = held or (grad.new_empty(size), torch.zeros((), dtype=torch.bool, device=grad.device))
        gather_(grad, places.lookup, places.count, values, flag if checks else None, adds=held is not None)
    return values, flag


def _by_kind(members: Sequence[Member], served: Sequence[int]) -> list[tuple[list[int], list[Any]]]:
    """Positions and members of each launch."""
    from gmt_tune.optim.kernels.update import Selected, can_update

    kinds: dict[tuple, tuple[list[int], list[Any]]] = {}
    for i in served:
        weight, grad, state, places = members[i]
        if places.count == 0:
            continue
        moments = state["exp_avg"], state["exp_avg_sq"]
        selected = Selected(weight, grad, *moments, state["age"], places.lookup, places.count)
        if can_update(selected):
            for held, one in zip(kinds.setdefault(selected.kind(), ([], [])), (i, selected), strict=True):
                held.append(one)
    return list(kinds.values())


def _update(kernels: ModuleType, members: list[Any], group: dict[str, Any], stochastic_round: bool) -> bool:
    from gmt_tune.optim.kernels.update import update_

    with kernels.on_device(members[0].weight.device):
        update_(members, group, stochastic_round=stochastic_round)
    for member in members:  # autograd notices, as with PyTorch's own operations
        torch.autograd.graph.increment_version(member.weight)
    return True


def _carries_by_kind(
    turns: Sequence[Turn], state_bits: int | str, age_dtypes: Sequence[torch.dtype], served: Sequence[int]
) -> list[tuple[list[int], list[Any]]]:
    """Positions, and states before and behind, of each launch."""
    from gmt_tune.optim.kernels.carry import States

    kinds: dict[tuple, tuple[list[int], list[Any]]] = {}
    for i in served:
        state, before, places, gradient = turns[i]
        if places.count == 0:
            continue
        size, device = gradient.numel(), gradient.device
        first, second = (states.empty(size, state_bits, signed=signed, device=device) for signed in (True, False))
        age = torch.empty(size, dtype=age_dtypes[i], device=device)
        new, old = States(first, second, age, places.lookup, places.count), None
        if state and before is not None and before.count:
            old = States(state["exp_avg"], state["exp_avg_sq"], state["age"], before.lookup, before.count)
        was = new.kind() if old is None else old.kind()
        if was[:-1] == new.kind()[:-1] and new.is_known() and (old is None or old.is_known()):
            for held, one in zip(kinds.setdefault((*new.kind(), was[-1]), ([], [])), (i, (old, new)), strict=True):
                held.append(one)
    return list(kinds.values())


def _carry(kernels: ModuleType, pairs: list[Any]) -> bool:
    from gmt_tune.optim.kernels.carry import carry

    with kernels.on_device(pairs[0][1].age.device):
        carry(pairs)
    return True
