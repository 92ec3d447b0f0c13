"""Optional: how much of a selection comes back at the next step, and how much of the model was ever selected.

Costs 2 bits of memory per masked entry and one more pass over the gradient; nothing is tracked unless one is made.
With a compact optimizer, also how old the selection is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking.gradient_mask import GradientMask
from gmt_tune.masking.host import to_host
from gmt_tune.masking.optimizers import (
    CompactOptimizer,
    after_closure,
    changes_no_weight,
    check_has_hooks,
    outside_graphs,
    owner_of,
    unwrap_optimizer,
)
from gmt_tune.masking.packing import check_saved_bits, pack_selection
from gmt_tune.masking.parts import Part, make_parts, own_ranges, part_of, sum_over_ranks

_CHUNK = 1 << 24  # entries that are looked at together: bounds what is alive besides the bits


class SelectionTracker:
    """Watches the gradients that a mask lets through.

    An entry counts as selected if its gradient is not zero behind the mask. With a mask that keeps its selection
    for several steps, entries of it whose gradient happens to be zero do not count. With a compact optimizer, which
    has no such gradients, the mask's selection counts.

    Where training is sharded, each rank keeps the bits of its own entries; counts are added up over the ranks, so
    that all of them read the same numbers. Each must therefore have a tracker.

    Args:
        mask: what it watches; only masked parameters count.
        every: look at every so many optimizer steps. Overlap is then that of selections so many steps apart, and
            coverage leaves out what was selected only in between.

    Raises:
        ValueError: if ``every`` is no whole number from 1 on.

    Example:
        >>> mask.register(optimizer)
        >>> tracker = SelectionTracker(mask)
        >>> tracker.register(optimizer)  # after the mask: hooks run in the order in which they were registered
    """

    def __init__(self, mask: GradientMask, every: int = 1) -> None:
        check_every(every)
        self._mask = mask
        self._every = every
        self._calls = dict.fromkeys(mask.masked_parameters, 0)
        self._last: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}
        # [selected both times, selected last time, ever selected], of all ranks; and [sum of ages, selected now]
        self._counts: dict[str, Tensor] = {}
        self._ages: dict[str, Tensor] = {}
        self._numel: dict[str, int] = {}
        self._numbers: _Numbers | None = None  # once they were read

    def register(self, optimizer: Optimizer) -> RemovableHandle:
        """Watch an optimizer's steps, until the handle that it returns is removed; after the mask's own ``register``.

        Raises:
            TypeError: if it is no optimizer, or one that runs no step hooks.
            ValueError: if it watches this optimizer already, and would count each step twice.
        """
        optimizer = unwrap_optimizer(optimizer)
        check_has_hooks(optimizer)
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(owner_of(hook) is self for hook in hooks):
            raise ValueError(f"this tracker watches the {type(optimizer).__name__} already: register it once")
        return optimizer.register_step_pre_hook(outside_graphs(self._before_step))

    def metrics(self) -> dict[str, float]:
        """Over all masked entries, at the last tracked step; waits for the device.

        Returns:
            ``mask/coverage``, and from the second tracked step on ``mask/overlap``: the fraction of the selection
            before that was selected again; with a compact optimizer ``mask/age``: the mean over selected entries of
            the optimizer steps, with this one, for which they have been selected without a break. Empty before the
            first step.
        """
        counts = self._read().counts.values()
        if not counts:
            return {}
        both, last, ever = map(sum, zip(*counts, strict=True))
        metrics = {"mask/coverage": ever / sum(self._numel.values())} | ({"mask/overlap": both / last} if last else {})
        ages = self._read().ages
        if selected := sum(count for _, count in ages):
            metrics["mask/age"] = sum(total for total, _ in ages) / selected
        return metrics

    def detail(self) -> dict[str, dict[str, float]]:
        """By parameter: ``{"overlap": {name: fraction}, "coverage": {name: fraction}}``."""
        counts = self._read().counts
        return {
            "overlap": {name: both / last for name, (both, last, _) in counts.items() if last},
            "coverage": {name: ever / self._numel[name] for name, (_, _, ever) in counts.items() if self._numel[name]},
        }

    def state_dict(self, *, copy: bool = False) -> dict[str, object]:
        """This rank's bits (uint8 by parameter name) and step counts; further steps change them unless ``copy``."""
        ever = {name: bits.clone() if copy else bits for name, bits in self._ever.items()}
        by_name = self._mask.masked_parameters
        shards = {name: own_ranges(by_name[name]) for name in ever}
        return {"calls": dict(self._calls), "last": dict(self._last), "ever": ever, "shards": shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, saved with the same model on as many ranks.

        Raises:
            ValueError: if it was saved for other parameters, or sharded otherwise.
        """
        bare = self._mask.translate_names(state_dict["calls"])
        by_name = self._mask.masked_parameters
        if not set(bare.values()) <= by_name.keys():
            raise ValueError("the selection tracker was saved for other parameters: start a new one")
        shards = {bare[name]: ranges for name, ranges in (state_dict.get("shards") or {}).items()}
        last, ever = ({bare[n]: bits for n, bits in state_dict[key].items()} for key in ("last", "ever"))
        for name, bits in (*last.items(), *ever.items()):
            check_saved_bits(name, bits, by_name[name], shards)
        self._calls = {bare[name]: count for name, count in state_dict["calls"].items()}
        self._last, self._ever = (
            {name: bits.to(by_name[name].device) for name, bits in saved.items()} for saved in (last, ever)
        )

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        if changes_no_weight(optimizer):
            return None

        def observe(is_repeated: bool) -> None:
            if not is_repeated:  # the selection is the same in all calls of one step's closure
                self._observe(self._mask.parameters_of(optimizer), optimizer)

        with_closure = after_closure(args, kwargs, observe)
        if with_closure is None:
            observe(False)
        return with_closure

    @torch.no_grad()
    def _observe(self, parameters: dict[str, Tensor], optimizer: Optimizer) -> None:
        self._numbers = None
        seen: dict[str, Tensor] = {}
        for name, p in parameters.items():
            calls = self._calls.get(name, 0)
            self._calls[name] = calls + 1
            if calls % self._every == 0:
                seen[name] = p
        if isinstance(optimizer, CompactOptimizer):
            parts = [part_of(p, name) for name, p in seen.items()]
            own = [self._selected_bits(part) for part in parts]
            ages = [self._age(p, optimizer) for p in seen.values()]
            self._ages.update(zip(seen, sum_over_ranks(ages, parts), strict=True))
        else:
            parts = make_parts(seen)
            own = [pack_selection(part.local, lambda block: block != 0) for part in parts]
        names = [part.name for part in parts]
        rows = [self._count(name, bits) for name, bits in zip(names, own, strict=True)]
        self._counts.update(zip(names, sum_over_ranks(rows, parts), strict=True))
        self._numel.update((part.name, part.numel) for part in parts)

    def _selected_bits(self, part: Part) -> Tensor:
        selection = self._mask.selection(part.grad)
        if selection is None:  # before the tensor's first turn
            return torch.zeros(-(-part.local.numel() // 8), dtype=torch.uint8, device=part.local.device)
        return selection.bits

    def _age(self, p: Tensor, optimizer: CompactOptimizer) -> Tensor:
        """The sum of the ages that selected entries have in this step, and how many entries these are."""
        selection = self._mask.selection(p)
        count = 0 if selection is None else selection.places.count
        total = torch.full((), count, device=p.device)  # the step that is about to begin
        if count:
            total += optimizer.state[p]["age"][:count].sum()
        return torch.stack([total, torch.full((), count, device=p.device)])

    def _count(self, name: str, now: Tensor) -> Tensor:
        """Take in what is selected now; the three counts of ``_counts`` for this rank's entries."""
        last, ever = self._last.get(name), self._ever.get(name)
        self._last[name] = now
        self._ever[name] = now.clone() if ever is None else ever.bitwise_or_(now)
        last = torch.zeros_like(now) if last is None else last
        return torch.stack([_count_bits(bits) for bits in (now & last, last, self._ever[name])])

    def _read(self) -> "_Numbers":
        """What is counted, on the host: in one transfer per device, and once until the next tracked step."""
        if self._numbers is None:
            counts, ages = self._counts.values(), self._ages.values()
            values = map(int, to_host([number for row in (*counts, *ages) for number in row.unbind()]))
            rows = [[next(values) for _ in range(row.numel())] for row in (*counts, *ages)]
            self._numbers = _Numbers(dict(zip(self._counts, rows, strict=False)), rows[len(self._counts) :])
        return self._numbers


@dataclass(frozen=True)
class _Numbers:
    counts: dict[str, list[int]]
    ages: list[list[int]]


def check_every(every: object, key: str = "every") -> None:
    """Raise ValueError, naming the key, unless it is a whole number from 1 on."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"{key} must be a whole number of optimizer steps from 1 on, got {every!r}")


def _count_bits(packed: Tensor) -> Tensor:
    """How many bits are set: 0-d int64."""
    total = torch.zeros((), dtype=torch.int64, device=packed.device)
    for part in packed.split(_CHUNK):
        # Sums of neighbouring bits, of pairs, of fours
        pairs = part - ((part >> 1) & 0x55)
        fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        total += ((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64)
    return total
