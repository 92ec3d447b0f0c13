"""What Triton's kernels do of a compact step, where they serve its tensors. What is left, the caller does by torch.

Each launch is tried by itself: an update is not to be made twice, and where a kernel cannot be compiled or launched,
nothing has changed yet.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking.places import Places
from gmt_tune.masking.search.devices import kernels_for, try_triton
from gmt_tune.optim import states

_TOGETHER = 1 << 25  # bytes of gradients that wait
_FLAGS = 256
Taken = tuple[Tensor, Tensor]  # selected entries of gradients, 1-d, and whether these held NaN or infinity, 0-d bool
# Of a new selection: the state, to be replaced; places before, if there were any, and now; and the gradient of these
Turn = tuple[dict[str, Any], Places | None, Places, Tensor]
# Entries, gradient of the selected ones, state, and places; None where all are selected
Member = tuple[Tensor, Tensor, dict[str, Any], Places | None]


class Gather(NamedTuple):
    """A gradient whose selected entries are to be written, with zeros behind them, or added.

    Attributes:
        places: of the selected entries.
        grad: the gradient.
        out: 1-d, of its dtype, at least ``places.count``.
        flag: 0-d bool, set if the gradient holds NaN or infinity; None does not look.
        adds: whether to add to ``out``, and leave what is behind the selected entries.
    """

    places: Places
    grad: Tensor
    out: Tensor
    flag: Tensor | None = None
    adds: bool = False


def can_gather(places: Places, grad: Tensor) -> bool:
    """Whether the kernels serve a gradient, of whatever device, dtype and strides."""
    if kernels_for([grad]) is None or places.count == 0:
        return False
    from gmt_tune.optim.kernels.gather import can_gather

    return can_gather(grad, places.lookup)


def gather_(members: Sequence[Gather]) -> None:
    """Gather what ``can_gather``, in a launch for each dtype and kind."""
    if not members:
        return
    from gmt_tune.optim.kernels.gather import kind_of

    kinds: dict[tuple, list[Gather]] = {}
    for member in members:
        kinds.setdefault(kind_of(member), []).append(member)
    for some in kinds.values():
        kernels = kernels_for([some[0].grad])
        if kernels is None or not try_triton(_gather_, kernels, some):
            for member in some:
                _gather_by_torch_(member)


def _gather_(kernels: ModuleType, members: list[Gather]) -> bool:
    from gmt_tune.optim.kernels.gather import gather_

    with kernels.on_device(members[0].grad.device):
        gather_(members)
    return True


def _gather_by_torch_(member: Gather) -> None:
    places, grad, out, flag, adds = member
    if not adds:
        out[places.count :] = 0
    if flag is None:
        places.gather(grad, out)
    else:
        flag |= places.gather_checked(grad, out, adds=adds)


class Waiting:
    """Gradients of one device, gathered together: a launch takes the host longer than a small one the device.

    Until then they stay in memory, of at most 32 MiB and one more.
    """

    def __init__(self) -> None:
        self._members: list[Gather] = []
        self._stream: Any = None
        self._flags: Iterator[Tensor] = iter(())

    def add(self, places: Places, grad: Tensor, held: Taken | None, size: int) -> Taken:
        """Gather into new memory of a size, or add to what this gave for the gradients before."""
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
        if any(held is not None and member.out is held[0] for member in self._members) or stream != self._stream:
            self.run()
        values, flag = held or (grad.new_empty(size), self._new_flag(grad.device))
        self._stream = stream
        self._members.append(Gather(places, grad, values, flag, held is not None))
        if sum(member.grad.nbytes for member in self._members) > _TOGETHER:
            self.run()
        return values, flag

    def run(self) -> None:
        """Gather now, whatever stream this is."""
        members, self._members = self._members, []
        if not members:
            return
        if self._stream is not None and (stream := torch.cuda.current_stream(self._stream.device)) != self._stream:
            stream.wait_stream(self._stream)
            for member in members:
                member.grad.record_stream(stream)
        gather_(members)

    def _new_flag(self, device: torch.device) -> Tensor:
        """False: one of many that are made at once."""
        if (flag := next(self._flags, None)) is None:
            self._flags = iter(torch.zeros(_FLAGS, dtype=torch.bool, device=device).unbind())
        return flag if flag is not None else next(self._flags)


def update_(members: Sequence[Member], group: dict[str, Any], *, stochastic_round: bool) -> list[int]:
    """Update entries in a launch for each kind of state and dtype; where all are selected, ``step`` counts it already.

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


def _by_kind(members: Sequence[Member], served: Sequence[int]) -> list[tuple[list[int], list[Any]]]:
    """Positions and members of each launch."""
    from gmt_tune.optim.kernels.update import Selected, can_update

    kinds: dict[tuple, tuple[list[int], list[Any]]] = {}
    for i in served:
        weight, grad, state, places = members[i]
        count = weight.numel() if places is None else places.count
        if count == 0:
            continue
        moments = states.own(state["exp_avg"]), states.own(state["exp_avg_sq"])
        age, lookup = (state["step"], None) if places is None else (state["age"], places.lookup)
        selected = Selected(weight, grad, *moments, age, lookup, count)
        if can_update(selected):
            for held, one in zip(kinds.setdefault(selected.kind(), ([], [])), (i, selected), strict=True):
                held.append(one)
    return list(kinds.values())


def _update(kernels: ModuleType, members: list[Any], group: dict[str, Any], stochastic_round: bool) -> bool:
    from gmt_tune.optim.kernels.update import update_

    with kernels.on_device(members[0].weight.device):
        update_(members, group, stochastic_round=stochastic_round)
    torch.autograd.graph.increment_version([member.weight for member in members])  # as PyTorch's own operations do
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
