"""CompactAdamW: AdamW that pays only for what a GradientMask selects."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.checks import names_unknown_keys
from gmt_tune.masking.gradient_mask import registered_masks
from gmt_tune.masking.nonfinite import nonfinite_flags
from gmt_tune.masking.optimizers import CompactOptimizer
from gmt_tune.masking.parts import Part, is_sharded, make_parts, own_entries, sum_over_ranks
from gmt_tune.masking.places import Places, take_ranked
from gmt_tune.masking.selection import PlacedSelection
from gmt_tune.optim import by_kernels, native, states

_STATES = ("exp_avg", "exp_avg_sq", "age")  # of selected entries


class CompactAdamW(CompactOptimizer):
    """AdamW whose gradients and states exist for the entries alone that a mask selects; the others do not move.

    On a step in which a tensor is not due for a new selection, its gradient is reduced to the selected entries as soon
    as autograd has accumulated it, and freed. Moments and ages exist for selected entries alone: at a new selection,
    entries that stay keep theirs, and new ones begin at zero. Each entry's bias correction uses its own age. Dense
    parameters get ordinary states of the same kind.

    With ``refresh_every`` above 1, tensors take turns, whole layers together, so that few are due at the same step;
    before its first turn a tensor stands still.

    Args:
        params: as for every optimizer: parameters or groups.
        lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``; ``lr`` may be a tensor.
        state_bits: of the moments: 32, 8, 4 or "fp8". The latter three are torchao's, in blocks; tensors with fewer
            than 4,096 selected entries keep 32.
        bf16_stochastic_round: round bfloat16 weights up or down by chance, so that small updates count on average.
        max_grad_norm: clip the gradient that will be applied, selected entries and dense parameters of all ranks, to
            this norm; infinity measures it alone. It is not that of the whole gradient, which no longer exists when it
            would be known.

    Attributes:
        grad_norm: that norm before clipping, at the last step, 0-d; None without ``max_grad_norm``.

    Example:
        >>> mask = GradientMask(model.named_parameters(), density=0.05, refresh_every=20, dense=["*norm*"])
        >>> optimizer = CompactAdamW(model.parameters(), lr=1e-4, state_bits=8)
        >>> handle = mask.register(optimizer)
    """

    # With it, a GradScaler leaves gradients to the optimizer, which says that it cannot do with it
    _step_supports_amp_scaling = True

    @names_unknown_keys
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int | str = 32,
        bf16_stochastic_round: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            _check(name, value, "must be a number from 0 on", lambda number: 0 <= number < math.inf)
        for i, beta in enumerate(betas):
            _check(f"betas[{i}]", beta, "must be a number from 0 on and below 1", lambda number: 0 <= number < 1)
        if state_bits not in states.STATE_BITS:
            raise ValueError(f"state_bits must be one of {', '.join(map(str, states.STATE_BITS))}, got {state_bits!r}")
        if max_grad_norm is not None:
            _check("max_grad_norm", max_grad_norm, "must be a number above 0, or None", lambda number: number > 0)
        if state_bits != 32:
            import torchao.optim  # noqa: F401  # torch.load(weights_only=True) knows its states from then on
        self.state_bits, self.bf16_stochastic_round = state_bits, bf16_stochastic_round
        self.max_grad_norm = max_grad_norm
        # Selected entries of gradients that wait for the step, and whether the gradients were not finite anywhere
        self._taken: dict[Any, tuple[Part, Tensor]] = {}
        # By device: autograd has a thread for each
        self._waiting: dict[torch.device, by_kernels.Waiting] = defaultdict(by_kernels.Waiting)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    # ------------------------------------------------------------------ what a mask calls

    @torch.no_grad()
    def add_gradient(self, part: Part, selection: PlacedSelection | None) -> None:
        taken = self._taken.get(part.parameter)
        held = None if taken is None else (taken[0].local, taken[1])
        if selection is None:
            (flag,) = nonfinite_flags([part.local])
            self._take(part, part.local.new_empty(0), flag if held is None else flag | held[1])
            return
        places, size = selection.places, states.padded_size(selection.places.count, self.state_bits)
        if by_kernels.can_gather(places, part.local):
            gathered = self._waiting[part.local.device].add(places, part.local, held, size)
        else:
            self._gather_waiting()  # a kernel that has failed may still be to add to the same entries
            values = _padded(places, part.local, size) if held is None else held[0]
            flag = places.gather_checked(part.local, values, adds=held is not None)
            gathered = values, flag if held is None else flag | held[1]
        self._take(part, *gathered)

    @torch.no_grad()
    def change_selections(
        self,
        parts: Sequence[Part],
        before: Sequence[PlacedSelection | None],
        selections: Sequence[PlacedSelection],
    ) -> None:
        sizes = {i: states.padded_size(new.places.count, self.state_bits) for i, new in enumerate(selections)}
        for batch in states.batches(sizes, parts[0].local.device if parts else None):
            self._turn([parts[i] for i in batch], [before[i] for i in batch], [selections[i] for i in batch])

    def _turn(self, parts: list[Part], before: list[PlacedSelection | None], selections: list[PlacedSelection]) -> None:
        """Change some selections: what is new lies beside what was until all of these are changed."""
        turns: list[by_kernels.Turn] = []
        ages = []
        devices = {part.local.device for part in parts}
        flags = {device: torch.zeros(len(parts), dtype=torch.bool, device=device).unbind() for device in devices}
        gathered = self._gather(parts, selections)
        for i, (part, old, new) in enumerate(zip(parts, before, selections, strict=True)):
            p: Any = part.parameter
            if self.state[p]:
                self._check_fits(part, old)
            self._take(part, gathered[i], flags[part.local.device][i])
            p.grad = None
            turns.append((self.state[p], None if old is None else old.places, new.places, gathered[i]))
            ages.append(self._age_dtype(p))
        for i in by_kernels.carry_(turns, self.state_bits, ages):
            self._carry_(*turns[i], ages[i])

    def _carry_(
        self, state: dict[str, Any], before: Places | None, places: Places, gradient: Tensor, age_dtype: torch.dtype
    ) -> None:
        """As :func:`by_kernels.carry_`, by torch."""
        size, device = gradient.numel(), gradient.device
        kept = list(places.ranks_in(before)) if state and before is not None else []
        new = torch.empty if sum(part.stop - part.start for part, *_ in kept) == size else torch.zeros
        for key in _STATES:
            values = new(size, dtype=age_dtype if key == "age" else torch.float32, device=device)
            for part_of_new, near, rank in kept:
                held, first = states.read_near(state[key], near)
                take_ranked(held, rank, first, out=values[part_of_new])
            self._set_state(state, key, values)

    def _gather_waiting(self) -> None:
        for waiting in self._waiting.values():
            waiting.run()

    def nonfinite(self) -> list[tuple[Part, Tensor]]:
        self._gather_waiting()
        return list(self._taken.values())

    @torch.no_grad()
    def load_compact_state(self, p: Tensor, key: str, values: Tensor, count: int) -> None:
        size, device = states.padded_size(count, self.state_bits), own_entries(p).device
        state = self._new_state(key, size, values.dtype, device)
        if type(values) is type(state) and values.shape == state.shape:
            state.copy_(values)
        else:  # other ranks held other entries, or the bits were others
            floats = states.to_floats(values).to(device)[:count]
            states.fill_(state, torch.nn.functional.pad(floats, (0, size - count)))
        self.state[p][key] = state

    def _new_state(self, key: str, size: int, age_dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros, as a state of selected entries holds them."""
        if key == "age":
            return torch.zeros(size, dtype=age_dtype, device=device)
        return states.zeros((size,), self.state_bits, signed=key == "exp_avg", device=device)

    def _set_state(self, held: dict[str, Any], key: str, values: Tensor) -> None:
        """Hold a state of selected entries in float32 or an age: as it is, or quantized."""
        state = held.get(key)
        if state is None or state.shape != values.shape:
            state = self._new_state(key, values.numel(), values.dtype, values.device)
        if states.is_quantized(state):
            states.fill_(state, values)
        else:
            state = values
        held[key] = state

    def _gather(self, parts: Sequence[Part], selections: Sequence[PlacedSelection]) -> list[Tensor]:
        """The selected entries of gradients, with zeros behind them up to the size of their states."""
        gathered, waiting = [], []
        for part, places in zip(parts, (selection.places for selection in selections), strict=True):
            size = states.padded_size(places.count, self.state_bits)
            if by_kernels.can_gather(places, part.local):
                gathered.append(part.local.new_empty(size))
                waiting.append(by_kernels.Gather(places, part.local, gathered[-1]))
            else:
                gathered.append(_gather(places, part.local, size))
        by_kernels.gather_(waiting)
        return gathered

    def _take(self, part: Part, values: Tensor, flag: Tensor) -> None:
        self._taken[part.parameter] = replace(part, grad=values, local=values), flag

    def _check_fits(self, part: Part, selection: PlacedSelection | None) -> None:
        """Raise RuntimeError unless a parameter has states of what is selected, or none where nothing is."""
        p: Any = part.parameter
        state, size = self.state.get(p, {}), None
        if selection is not None:
            size = (states.padded_size(selection.places.count, self.state_bits),)
        if {key: value.shape for key, value in state.items()} == ({} if size is None else dict.fromkeys(_STATES, size)):
            return
        raise RuntimeError(
            f"CompactAdamW's states of '{part.name}' are not those of the entries that the mask selects: load the "
            "state_dict of both the mask and the optimizer, saved after the same step, with state_bits as it was then; "
            "for a new mask, empty the states by optimizer.state.clear()"
        )

    def _age_dtype(self, p: Tensor) -> torch.dtype:
        betas = next(group["betas"] for group in self.param_groups if any(p is q for q in group["params"]))
        return torch.int16 if states.counts_in_16_bits(betas) else torch.int32

    # ------------------------------------------------------------------ what a training loop calls

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update the selected entries and the dense parameters, and let go of the gradient's selected entries.

        Args:
            closure: as for every optimizer: computes the loss and its gradient once more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hasattr(self, "grad_scale") or hasattr(self, "found_inf"):
            raise RuntimeError("CompactAdamW takes no GradScaler: train in bfloat16, which needs none, or in float32")
        masks = registered_masks(self)
        if not masks:
            raise RuntimeError(
                "CompactAdamW updates what a mask selects: call mask.register(optimizer) before its step"
            )
        self._gather_waiting()
        taken, self._taken = self._taken, {}
        selections: dict[Any, Any] = {p: next(filter(None, (mask.selection(p) for mask in masks)), None) for p in taken}
        for p, (part, _) in taken.items():
            self._check_fits(part, selections[p])
        dense = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        parts = [part for part, _ in taken.values()]
        parts += make_parts({str(i): p for i, p in enumerate(dense)})
        if self.max_grad_norm is not None and parts:
            self._clip_(parts, self.max_grad_norm)
        gradients = {part.parameter: part for part in parts}
        for group in self.param_groups:
            held = [p for p in group["params"] if p in gradients]
            selected = [p for p in held if selections.get(p) is not None]  # none before the first turn
            places = [selections[p].places for p in selected]
            self._update_selected(selected, [gradients[p].local for p in selected], places, group)
            dense = [p for p in held if p not in taken]
            self._update_dense(dense, [gradients[p].local for p in dense], group)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "CompactAdamW cannot be copied or pickled, for its states belong to a mask's selection: load the "
            "state_dict() of both into a new mask and a new optimizer"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every optimizer (``set_to_none`` too); selected entries that were taken in are dropped."""
        self._waiting.clear()
        self._taken.clear()
        super().zero_grad(set_to_none)

    def scale_gradients_(self, factor: Tensor | float) -> None:
        self._gather_waiting()
        _scale_([part.local for part, _ in self._taken.values()], factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer. The mask's own state_dict says whose states these are: load both.

        Raises:
            ValueError: if it was saved with other ``state_bits``, or for other parameters. Whether the mask selects
                what the states are of, the next step checks.
        """
        # PyTorch would cast moments and ages to the dtype of their parameters
        saved = state_dict["state"]
        for state in saved.values():
            self._check_kinds(state)
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        held = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, held, strict=True):
            if number in saved:
                self.state[p] = {
                    key: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in saved[number].items()
                }

    def _check_kinds(self, state: dict[str, Any]) -> None:
        for key in state.keys() & {"exp_avg", "exp_avg_sq"}:
            value = own_entries(state[key])
            wanted = states.zeros(value.shape, self.state_bits, signed=key == "exp_avg", device=value.device)
            if type(value) is not type(wanted):
                raise ValueError(
                    f"CompactAdamW has state_bits {self.state_bits!r}, and the loaded states are of another kind "
                    f"({type(value).__name__}): set state_bits as it was when they were saved"
                )

    def _clip_(self, parts: list[Part], max_norm: float) -> None:
        norms = torch._foreach_norm([part.local for part in parts], 2, dtype=torch.float32)
        squares = sum_over_ranks([square.view(1) for square in torch._foreach_mul(norms, norms)], parts)
        self.grad_norm = torch.cat([square.to(squares[0].device) for square in squares]).sum().sqrt()
        if max_norm == math.inf:  # which measures alone
            return
        _scale_([part.local for part in parts], (max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0))

    def _update_selected(
        self, parameters: list[Any], grads: list[Tensor], all_places: list[Places], group: dict
    ) -> None:
        held = [self.state[p] for p in parameters]
        own = [own_entries(p) for p in parameters]
        left = self._update_at_once(list(zip(own, grads, held, all_places, strict=True)), group)
        for batch in states.batches({i: grads[i].numel() for i in left}, own[0].device if own else None):
            for i in batch:
                age = held[i]["age"]
                age.clamp_(max=torch.iinfo(age.dtype).max - 1).add_(1)
            weights = [_gather(all_places[i], own[i], grads[i].numel()) for i in batch]
            self._adamw_(weights, [grads[i] for i in batch], "age", [held[i] for i in batch], group)
            for i, values in zip(batch, weights, strict=True):
                all_places[i].scatter_(values, own[i])

    def _update_dense(self, parameters: list[Any], grads: list[Tensor], group: dict) -> None:
        held = [self.state[p] for p in parameters]
        for p, state in zip(parameters, held, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=own_entries(p).device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = self._new_buffer(p, key == "exp_avg")
        if held:
            torch._foreach_add_([state["step"] for state in held], 1)
        own = [own_entries(p) for p in parameters]
        left = self._update_at_once([(*each, None) for each in zip(own, grads, held, strict=True)], group)
        weights = [own[i].reshape(-1) for i in left]
        self._adamw_(weights, [grads[i].reshape(-1) for i in left], "step", [held[i] for i in left], group)
        for i, values in zip(left, weights, strict=True):
            if not own[i].is_contiguous():
                own[i].copy_(values.view(own[i].shape))

    def _update_at_once(self, members: list[Any], group: dict) -> list[int]:
        """Update what Triton and C++ serve; returns the positions of the others."""
        left = by_kernels.update_(members, group, stochastic_round=self.bf16_stochastic_round)
        rest = [members[i] for i in left]
        return [left[i] for i in native.update_(rest, group, stochastic_round=self.bf16_stochastic_round)]

    def _adamw_(self, weights: list[Tensor], grads: list[Tensor], age: str, held: list[dict], group: dict) -> None:
        first, second = ([states.own(state[key]).view(-1) for state in held] for key in ("exp_avg", "exp_avg_sq"))
        ages, rounds = [state[age] for state in held], self.bf16_stochastic_round
        states.adamw_(weights, grads, ages, first, second, group, stochastic_round=rounds)

    def _new_buffer(self, p: Any, signed: bool) -> Tensor:
        """A moment of a dense parameter, sharded as that is; by the name that torchao's optimizers give it."""
        own = own_entries(p)
        local = states.zeros(own.shape, self.state_bits, signed=signed, device=own.device)
        if not is_sharded(p):
            return local
        from torch.distributed.tensor import DTensor

        if p.device_mesh.device_type != local.device.type:  # fsdp_cpu_offload: from_local would move it to the device
            return DTensor(local, p._spec, requires_grad=False)
        return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _gather(places: Places, entries: Tensor, size: int) -> Tensor:
    """The selected entries, with zeros behind them up to a size."""
    return places.gather(entries, out=_padded(places, entries, size))


def _scale_(tensors: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply tensors on any devices by a number, in few launches: with fsdp_cpu_offload, it is not where they are."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, members in by_device.items():
        torch._foreach_mul_(members, factor.to(device) if isinstance(factor, Tensor) else factor)


def _padded(places: Places, entries: Tensor, size: int) -> Tensor:
    """Memory for selected entries, with zeros behind them up to a size."""
    values = entries.new_empty(size)
    if size > places.count:
        values[places.count :] = 0
    return values


def _check(name: str, value: Any, wanted: str, is_right: Callable[[float], bool]) -> None:
    number = value.item() if isinstance(value, Tensor) else value
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not is_right(number):
        raise ValueError(f"{name} {wanted}, got {value!r}")
