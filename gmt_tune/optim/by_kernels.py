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

Taken = tuple[Tensor, Tensor]  # selected entries of gradients, 1-d, and whether these held NaN or infinity, 0-d bool
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
