"""GradientMask: the mask as an object with a policy, for any training loop and any optimizer.

It counts optimizer steps, keeps the selection between refreshes, and what the last step did. Which parameters are
masked, ``parameters`` says; what is selected of their gradients, ``scores`` and ``selection``.
"""

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking import checks
from gmt_tune.masking.flat import FlatShard
from gmt_tune.masking.functional import MaskStatistics
from gmt_tune.masking.nonfinite import DelayedFlags
from gmt_tune.masking.optimizers import (
    CompactOptimizer,
    HookHandles,
    after_closure,
    changes_no_weight,
    check_has_hooks,
    outside_graphs,
    owner_of,
    unwrap_optimizer,
)
from gmt_tune.masking.packing import check_saved_bits, pack_selection
from gmt_tune.masking.parameters import DEFAULT_DENSE, MaskedParameters
from gmt_tune.masking.parts import (
    Part,
    is_sharded,
    make_parts,
    nonfinite_gradients,
    on_any_rank,
    own_entries,
    own_ranges,
    part_of,
    sum_counts,
)
from gmt_tune.masking.places import Places
from gmt_tune.masking.schedule import Schedule, spread_turns
from gmt_tune.masking.scores import Random, Score, UserScore, make_score
from gmt_tune.masking.selection import PackedSelection, PlacedSelection, Selection, WholeSelection, apply_, pack
from gmt_tune.masking.ties import place_exactly

# What a subclass may override: which of them it does, a saved state says
_RULES = ("compute_score", "select", "apply_", "refreshes", "scope_of")


class GradientMask:
    r"""Zeroes, right before each optimizer step, all gradient entries but those with the largest score.

    With gradient :math:`g`, :math:`n` entries in the scope and :math:`k = \max(1, \lfloor \rho n \rfloor)` for
    density :math:`\rho`, an entry stays if its score is at least the k-th largest one and not zero
    (Li et al., AAAI 2025, arXiv 2406.15330, where the mask ratio is :math:`1 - \rho`).

    The gradient is zeroed, not the update: an optimizer with momentum or weight decay still moves weights
    whose gradient was zeroed.

    Args:
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them: of the whole model,
            since an optimizer that holds others is refused.
        density: fraction of entries that stay, in (0, 1]. 1.0 masks nothing.
        score: what entries are ranked by: "magnitude" (of the gradient), "saliency" (of gradient times
            weight) or "random".
        scope: over what the top fraction is taken: each "tensor", or all masked tensors together ("global").
        refresh_every: optimizer steps between two selections; None selects once, at the first step.
            Selections that outlive a step are kept at 1 bit per entry.
        dense: name patterns (``fnmatch``) of parameters that are updated in full. By default norms, as far as their
            names say so: "ln_1" does not. ``["*norm*"]``, the default, may match nothing and leaves to ``frozen`` what
            both match; any other pattern may not. ``()`` and None mask all.
        frozen: name patterns of parameters that are not updated at all: they stop requiring gradients.
        seed: of the random score.
        error_if_nonfinite: raise if the gradient of a masked or dense parameter holds NaN or infinity, before any
            weight changes. On CUDA, so as not to keep the device waiting, the step is launched first, and the same
            call of the optimizer's ``step`` raises behind it, or with an optimizer that steps within the backward pass,
            ``backward()`` at its end: no later code sees the weights. For that, the host waits for the device once.

    Raises:
        TypeError, ValueError: if an argument is out of its range, misspelt, or a pattern matches nothing.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> mask = GradientMask(model.named_parameters(), density=0.2)
        >>> handle = mask.register(optimizer)

    A subclass overrides :meth:`compute_score` for a new score, :meth:`refreshes` for another rule of when selections
    are made, :meth:`scope_of` for another scope, :meth:`select` for another rule of selection, or :meth:`apply_` for
    something else than zeroing what is not selected. A saved state names what was overridden and by which class, so
    that going on under another rule is refused; a rule's own arguments are its class's to add to :meth:`policy`.
    """

    @checks.names_unknown_keys
    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        density: float,
        *,
        score: str = "magnitude",
        scope: str = "tensor",
        refresh_every: int | None = 1,
        dense: Sequence[str] = DEFAULT_DENSE,
        frozen: Sequence[str] = (),
        seed: int = 0,
        error_if_nonfinite: bool = True,
    ) -> None:
        self.density = checks.check_density(density)
        self.scope = checks.check_scope(scope)
        self.score = checks.check_score(score)
        self.refresh_every = checks.check_refresh_every(refresh_every)
        self.seed = checks.check_int("seed", seed)
        if not isinstance(error_if_nonfinite, bool):
            raise TypeError(f"error_if_nonfinite must be true or false, got {error_if_nonfinite!r}")
        self.error_if_nonfinite = error_if_nonfinite
        self.dense = checks.check_patterns("dense", dense)
        self.frozen = checks.check_patterns("frozen", frozen)
        self._parameters = MaskedParameters(named_parameters, self.dense, self.frozen)
        self._schedule = Schedule(self.refresh_every)
        self._phases: dict[str, int] = {}  # of tensors that take turns, by name
        self._has_own_schedule = type(self).refreshes is not GradientMask.refreshes
        self._last_due: dict[str, tuple[int, int]] = {}  # by name, under a rule of a subclass: the step, seen up to
        self._is_compact = False  # the optimizer keeps gradients and states of selected entries alone
        self._steps: dict[str, int] = {}  # optimizer steps that were masked, by name
        self._selections: dict[str, PackedSelection | PlacedSelection] = {}
        self._seconds: dict[int, float] = {}  # by the first of the parameters that are stepped together
        self._flags = DelayedFlags()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._grad_scale: Tensor | None = None  # that a fused optimizer will divide gradients by, inside its step
        self._repeats = False  # the closure of one step is called again: its selection stays
        self.statistics = MaskStatistics()

    # ------------------------------------------------------------------ what a subclass may override

    def compute_score(self, name: str, parameter: Tensor, grad: Tensor) -> Tensor:
        """What the entries of one parameter are ranked by. Override it for a new score.

        Args:
            name: the parameter's name.
            parameter: its weights.
            grad: the gradient that the optimizer is about to see, of the same shape.

        Where training is sharded, both are DTensors, and so must be what is returned; arithmetic on them gives
        one.

        Returns:
            A floating-point tensor of the gradient's shape; the magnitude of its entries is the score.
            It is not changed; returning ``grad`` itself costs no memory. With scope "tensor" it is freed before the
            next one is asked for, with "global" all are alive together.
        """
        return grad * parameter.detach() if self.score == "saliency" else grad

    def refreshes(self, name: str, step: int) -> bool:
        """Whether a tensor gets a new selection in an optimizer step. Override it for another schedule.

        It is asked before the backward pass, more than once, also of steps that are over, and on every rank: the answer
        may depend on its arguments and on what :meth:`policy` says alone. A tensor that has no selection yet gets one
        in its first step whatever the answer is, except with a compact optimizer and ``refresh_every`` above 1.

        Args:
            name: the parameter's name.
            step: of this parameter's optimizer steps, counted from 0.
        """
        return self._schedule.is_due(step, self._phases.get(name, 0))

    def scope_of(self, name: str) -> str:
        """Over what the top fraction is taken: over all tensors with the same answer. Override it for another scope.

        The answer may depend on the name alone. Tensors of one scope should be due at the same steps: those that are
        due compete with each other. Several tensors in a scope do not work with a compact optimizer.

        Args:
            name: the parameter's name.
        """
        return name if self.scope == "tensor" else "global"

    def select(self, parts: Sequence[Part]) -> list[Selection]:
        """Which entries stay of gradients that get a new selection in this step. Override it for another rule.

        Args:
            parts: of the gradients, in the order of the optimizer. On several ranks, all call it with the same ones.

        Returns:
            A selection for each: see :mod:`gmt_tune.masking.selection`. Gradients are not changed.
        """
        if self.density == 1.0:
            return [WholeSelection(part) for part in parts]
        return self._score().select(parts, self.density, [self.scope_of(part.name) for part in parts])

    def apply_(
        self, parts: Sequence[Part], selections: Sequence[Selection], optimizer: Optimizer | None
    ) -> list[Tensor]:
        """Zero, in place, what selections leave out. Override it for something else, or something more.

        Args:
            parts, selections: of this step's gradients; selections are new ones, or those that were kept.
            optimizer: which is about to step; None in :meth:`mask_grads_`.

        Returns:
            How many entries of each whole gradient stay, 0-d int64.
        """
        return apply_(parts, selections)

    # ------------------------------------------------------------------ use

    def register(self, optimizer: Optimizer, *, shards: Mapping[Tensor, FlatShard] | None = None) -> RemovableHandle:
        """Mask the gradients of an optimizer's parameters right before each of its steps.

        With an optimizer per parameter (optimizer in backward), register each of them. Parameters that did not
        require gradients when the mask was made, and do later, are masked from then on.

        Args:
            optimizer: any ``torch.optim.Optimizer``, also inside accelerate's or Fabric's wrapper.
            shards: by parameter of the model, where the optimizer steps flat tensors that parameters lie in, all or
                some at a time: see :func:`gmt_tune.integrations.deepspeed.register`.

        Returns:
            A handle; ``handle.remove()`` ends the masking.

        Raises:
            TypeError: if it is no optimizer, or one that runs no step hooks; if :meth:`policy` gives what a checkpoint
                cannot hold.
            ValueError: if it has this mask already, or one that masks the same parameters; if it holds no parameter of
                this mask, or one that the mask does not know and whose group does not say ``"gradient_mask": False``;
                if it holds a part of the parameters of a scope; for a compact one, if a scope has several.

        Not for a step that is captured in a CUDA graph, which fails with an error of CUDA's: capture forward and
        backward alone.
        """
        optimizer = unwrap_optimizer(optimizer)
        check_has_hooks(optimizer)
        checks.check_policy(self.policy())
        if shards is not None:
            self._parameters.flatten(shards)
        masked = self._parameters.masked
        for registered in registered_masks(optimizer):
            if registered is self or not self._parameters.stepped().isdisjoint(registered._parameters.stepped()):
                which = "this mask" if registered is self else "another gradient mask of the same parameters"
                raise ValueError(
                    f"{which} is registered on the {type(optimizer).__name__} already, and both would act in each "
                    "step: register once, or end the first one with the remove() of the handle that its register "
                    "returned"
                )
        held = {p for group in optimizer.param_groups for p in self._parameters.held(group)}
        held.update((shards or {}).values())  # some of which may be in the optimizer only while it steps them
        if held.isdisjoint(self._parameters.names):
            raise ValueError(
                "the optimizer holds none of the mask's parameters: make the mask from the "
                "named_parameters() of the model as the optimizer sees it, after wrapping or moving it"
            )
        self._parameters.sort(optimizer, lambda p: p.requires_grad)
        own_scopes = {self.scope_of(masked[p]) for p in masked.keys() & held}
        if lacking := [name for p, name in masked.items() if p not in held and self.scope_of(name) in own_scopes]:
            name = min(lacking)
            raise ValueError(
                f"scope '{self.scope_of(name)}' needs one optimizer that holds all masked parameters of it, and this "
                f"one lacks '{name}' ({len(lacking)} in all): give it all of them, or use scope 'tensor'"
            )
        hooks = self._take_turns(optimizer) if isinstance(optimizer, CompactOptimizer) else []
        self._optimizers.add(optimizer)
        return HookHandles(
            optimizer.register_step_pre_hook(outside_graphs(self._before_step)),
            optimizer.register_step_post_hook(outside_graphs(self._after_step)),
            *hooks,
        )

    def _take_turns(self, optimizer: CompactOptimizer) -> list[RemovableHandle]:
        """Let an optimizer have selected entries alone: tensors take turns, and what is not due is freed at once."""
        if scopes := self.scopes_of_several():
            raise ValueError(f"scope '{scopes[0]}' does not work with {type(optimizer).__name__}: use scope 'tensor'")
        if type(self).apply_ is not GradientMask.apply_:
            raise TypeError(
                f"{type(self).__name__} overrides apply_, which changes whole gradients, and "
                f"{type(optimizer).__name__} has none: override select or compute_score, or use another optimizer"
            )
        self._is_compact = True
        turns = self.refresh_every or 1
        self._schedule = Schedule(self.refresh_every, in_turns=turns > 1)
        self._phases = spread_turns({name: p.numel() for name, p in self.maskable_parameters.items()}, turns)

        def take_in(p: Tensor) -> None:
            name = self._parameters.masked.get(p)
            if name is not None and p.grad is not None and not self.is_due(name):
                (part,) = make_parts({name: p})
                if part.local.is_cpu and torch.cuda.is_initialized():  # FSDP2's offloading may still be copying it
                    torch.cuda.current_stream().synchronize()
                optimizer.add_gradient(part, self._placed(name))
                p.grad = None

        def keep_alone(p: Tensor) -> None:
            """FSDP2 reduces a layer's gradients into one buffer, which the smallest of them would keep in memory."""
            if p.grad is not None and is_sharded(p.grad):
                local = own_entries(p.grad)
                if local.untyped_storage().nbytes() > local.nbytes:
                    p.grad = p.grad.clone()

        held = {p for group in optimizer.param_groups for p in group["params"]}
        maskable = set(self.maskable_parameters.values())
        return [
            p.register_post_accumulate_grad_hook(take_in if p in maskable else keep_alone)
            for p in self._parameters.names
            if p in held and p.requires_grad
        ]

    def mask_grads_(self) -> MaskStatistics:
        """Mask the gradients of all masked parameters, once, in place: for loops without a hook.

        Call it once per optimizer step, after accumulation and clipping. With ``error_if_nonfinite`` it waits for the
        device.

        Returns:
            What was selected; reading its values waits for the device.

        Raises:
            RuntimeError: if the mask is registered on an optimizer, whose steps would mask again.
        """
        if any(self in registered_masks(optimizer) for optimizer in self._optimizers):
            raise RuntimeError(
                "the mask is registered on an optimizer, and masks in each of its steps: do not call mask_grads_() "
                "as well"
            )
        for p in self._parameters.names:
            if p.grad is not None:
                self._parameters.join(p)
        self._grad_scale = None
        self._mask(list(self._parameters.masked), self._parameters.dense(), None)
        self._flags.raise_if_set()
        return self.statistics

    def is_due(self, name: str) -> bool:
        """Whether a parameter gets a new selection in the next step; can be asked before the backward pass."""
        # A random one is kept by a compact optimizer alone
        has_none = name not in self._selections and (self._is_compact or not isinstance(self._score(), Random))
        return (has_none and not self._schedule.in_turns) or self._refreshes(name, self._steps.get(name, 0))

    def _refreshes(self, name: str, step: int) -> bool:
        return checks.check_answer("refreshes()", self.refreshes(name, step))

    def draw(self, name: str) -> int:
        """Which selection of a parameter is in force in this step, a number from 0 on that rises at each refresh."""
        step = self._steps.get(name, 0) - self._repeats
        if not self._has_own_schedule:
            return self._schedule.draw(step, self._phases.get(name, 0))
        last, seen = self._last_due.get(name, (0, 0))
        if step < seen:  # an earlier state was loaded
            last, seen = 0, 0
        last = next((s for s in range(step, seen, -1) if self._refreshes(name, s)), last)
        self._last_due[name] = last, step
        return last

    def scopes_of_several(self) -> list[str]:
        """The scopes over which several tensors compete, "global" among them; none with scope "tensor"."""
        tensors = Counter(self.scope_of(name) for name in self.maskable_parameters)
        return [scope for scope, count in tensors.items() if count > 1 or scope == self.scope == "global"]

    @property
    def keeps_selections(self) -> bool:
        """Whether a selection is used in more than one step."""
        return self._schedule.keeps or self._has_own_schedule

    def selection(self, p: Tensor) -> PlacedSelection | None:
        """Which entries of a parameter are selected, for an optimizer that keeps these alone; None if none are yet."""
        name = self._parameters.masked.get(p)
        return None if name is None else self._placed(name)

    @property
    def masked_parameters(self) -> dict[str, Tensor]:
        """The parameters that are masked, by name, without what wrappers put into it."""
        return {name: p for p, name in self._parameters.masked.items()}

    def parameters_of(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Those of them that an optimizer holds, or of a flat one steps next."""
        held = [p for group in optimizer.param_groups for p in self._parameters.held(group)]
        return {self._parameters.masked[p]: p for p in held if p in self._parameters.masked}

    @property
    def maskable_parameters(self) -> dict[str, Tensor]:
        """Those, and the ones that will be masked once they require gradients."""
        return self._parameters.maskable()

    @property
    def step(self) -> int:
        """Optimizer steps that were masked so far."""
        return max(self._steps.values(), default=0)

    @property
    def seconds(self) -> float:
        """Time that the host spent on masking the last step; a GPU's own time is not in it."""
        return sum(self._seconds.values())

    def metrics(self) -> dict[str, float]:
        """The last step in numbers for a metric logger. Waits for the device.

        Returns:
            ``mask/density`` (fraction of masked entries that stayed), ``mask/seconds`` (time that the host spent
            on it: on a GPU, to launch its work) and, unless the score is random, ``mask/threshold_min``, ``_median``
            and ``_max`` over the tensors. Empty before the first step.
        """
        self._flags.raise_if_set()
        if not self.statistics.numel:
            return {}
        metrics = {"mask/density": self.statistics.density, "mask/seconds": self.seconds}
        if numbers := self.statistics.read().thresholds:
            thresholds = torch.tensor(list(numbers.values()), dtype=torch.float64, device="cpu")
            metrics["mask/threshold_min"] = thresholds.min().item()
            metrics["mask/threshold_median"] = thresholds.median().item()
            metrics["mask/threshold_max"] = thresholds.max().item()
        return metrics

    # ------------------------------------------------------------------ the hooks

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        if changes_no_weight(optimizer):  # so there is nothing to mask or to count
            return None
        grad_scale = getattr(optimizer, "grad_scale", None)
        self._grad_scale = grad_scale if isinstance(grad_scale, Tensor) else None

        def mask(is_repeated: bool) -> None:
            masked, dense = self._parameters.sort(optimizer, lambda p: p.grad is not None)
            if isinstance(optimizer, CompactOptimizer):
                self._select_compactly(masked, dense, optimizer)
            else:
                self._mask(masked, dense, optimizer, is_repeated=is_repeated)

        def keep_selections() -> None:
            if not self.keeps_selections and not isinstance(self._score(), Random):
                for name, p in self.parameters_of(optimizer).items():
                    if p.grad is not None:
                        entries, threshold = own_entries(p.grad), self.statistics.thresholds.get(name)
                        bits = pack_selection(entries, lambda block: block != 0)
                        self._selections[name] = PackedSelection(bits, entries.shape, threshold)

        # A closure computes the gradients inside step(), after this hook: mask behind it instead.
        with_closure = after_closure(args, kwargs, mask, before_second=keep_selections)
        if with_closure is None:
            mask(False)
        return with_closure

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._grad_scale = None
        if not self.keeps_selections and not self._is_compact:
            self._selections.clear()  # what the calls of one step's closure had in common
        self._flags.raise_behind_backward()

    @torch.no_grad()
    def _mask(
        self, masked: list[Tensor], dense: list[Tensor], optimizer: Optimizer | None, *, is_repeated: bool = False
    ) -> None:
        """Mask the gradients of some parameters.

        Args:
            masked, dense: parameters; of dense ones, gradients are only looked at.
            optimizer: whose step this is.
            is_repeated: this is still the optimizer step of the call before, whose selection stays.
        """
        start = time.perf_counter()
        if not is_repeated:
            self._flags.raise_behind_backward()
        self._repeats = is_repeated
        names = [self._parameters.masked[p] for p in masked]
        if len(masked) == len(self._parameters.masked):
            self.statistics = MaskStatistics()  # what was given out before stays as it is
        self.statistics.forget(names)
        score = self._score()
        parts = make_parts(dict(zip(names, masked, strict=True)))
        kept: list[Part] = []
        due: list[Part] = []
        for part in parts:
            (kept if self._keeps_selection(part.name) else due).append(part)
        now = make_parts({self._parameters.names[p]: p for p in dense if self.error_if_nonfinite})
        for batch, selections in self._select_finite(due, score, [*now, *kept]):
            thresholds = [score.unscaled(s.threshold, self._grad_scale) for s in selections]
            if self.keeps_selections:
                lasting = [i for i, selection in enumerate(selections) if selection.outlasts_step]
                for i in lasting:  # not beside the new ones: their bits are a gigabyte for 8 B entries
                    self._selections.pop(batch[i].name, None)
                packed = pack([selections[i] for i in lasting], [thresholds[i] for i in lasting])
                self._selections.update(zip((batch[i].name for i in lasting), packed, strict=True))
            self.statistics.record(batch, self.apply_(batch, selections, optimizer), thresholds)
        if kept:
            selections = [self._selections[part.name] for part in kept]
            counts = self.apply_(kept, selections, optimizer)
            self.statistics.record(kept, counts, [selection.threshold for selection in selections])
        for name in names:
            self._steps[name] = self._steps.get(name, 0) + (not is_repeated)
        self._seconds[id(_first_parameter(optimizer))] = time.perf_counter() - start

    def _select_finite(
        self, due: Sequence[Part], score: Score, others: Sequence[Part]
    ) -> Iterator[tuple[Sequence[Part], list[Selection]]]:
        """Batches of what is due, with their new selections; raises where these or other gradients are not finite."""
        # Selecting looks at most gradients anyway: these are not read once more for it
        later = {part.name for part in due if self.density < 1.0 and score.sees_nonfinite(part)}
        self._raise_if_nonfinite([*others, *(part for part in due if part.name not in later)])
        for batch in score.batches(due, [self.scope_of(part.name) for part in due]):
            selections = self.select(batch)
            seen = [(part, s.nonfinite) for part, s in zip(batch, selections, strict=True) if part.name in later]
            self._raise_if_nonfinite([part for part, flag in seen if flag is None])
            seen_flags = {part: flag for part, flag in seen if flag is not None}
            self._raise_if_nonfinite(list(seen_flags), list(seen_flags.values()))
            yield batch, selections

    @torch.no_grad()
    def _select_compactly(self, masked: list[Tensor], dense: list[Tensor], optimizer: CompactOptimizer) -> None:
        """Give an optimizer the selected entries of what is due: the rest it has from the backward passes."""
        start = time.perf_counter()
        self._flags.raise_if_set()
        names = [self._parameters.masked[p] for p in masked]
        with_grad = {name: p for name, p in zip(names, masked, strict=True) if p.grad is not None}
        due = make_parts(with_grad)
        now = make_parts({self._parameters.names[p]: p for p in dense if p.grad is not None})
        if taken := optimizer.nonfinite():
            parts, flags = zip(*taken, strict=True)
            self._raise_if_nonfinite(parts, on_any_rank(flags, parts))
        self.statistics = self.statistics.copy()  # what was given out before stays as it is
        # Before its first turn nothing of a tensor is selected; behind resuming, what was counted before is not known
        uncounted = {name: p for name, p in zip(names, masked, strict=True) if name not in self.statistics.numel}
        parts = [part_of(p, name) for name, p in uncounted.items()]
        own = [placed.places.count if (placed := self._placed(name)) else 0 for name in uncounted]
        counts = sum_counts([torch.full((), n, device=p.local.device) for n, p in zip(own, parts, strict=True)], parts)
        self.statistics.record(parts, counts, [None] * len(parts))
        for batch, selections in self._select_finite(due, self._score(), now):
            thresholds = [selection.threshold for selection in selections]
            placed, counts = place_exactly(batch, selections, thresholds, self.density)
            optimizer.change_selections(batch, [self._placed(part.name) for part in batch], placed)
            self._selections.update(zip((part.name for part in batch), placed, strict=True))
            self.statistics.record(batch, counts, thresholds)
        for name in names:
            self._steps[name] = self._steps.get(name, 0) + 1
        self._seconds[id(_first_parameter(optimizer))] = time.perf_counter() - start

    def _placed(self, name: str) -> PlacedSelection | None:
        """The selection that is in force for a tensor, by places: one that was loaded is in bits."""
        kept = self._selections.get(name)
        if isinstance(kept, PackedSelection):
            kept = PlacedSelection(Places(kept.bits, kept.shape.numel()), kept.shape)
            self._selections[name] = kept
        return kept

    def _score(self) -> Score:
        if type(self).compute_score is not GradientMask.compute_score:
            return UserScore(self.compute_score, self._grad_scale)
        return make_score(self.score, self.seed, self.draw, is_exact=self._is_compact)

    def _keeps_selection(self, name: str) -> bool:
        return name in self._selections and (self._repeats or not self.is_due(name))

    def _raise_if_nonfinite(self, parts: Sequence[Part], flags: Sequence[Tensor] | None = None) -> None:
        """Raise if a gradient is not finite: now on the CPU, behind the step on CUDA."""
        if self.error_if_nonfinite and parts:
            flags = nonfinite_gradients(parts) if flags is None else flags
            self._flags.add(
                [part.name for part in parts], flags, f" at optimizer step {self.step + (not self._repeats)}"
            )

    # ------------------------------------------------------------------ state

    def policy(self) -> dict[str, object]:
        """What decides what is selected, for checkpoints and logs: arguments, and methods that a subclass overrides.

        A subclass adds its own arguments to it, as numbers, texts, lists or dicts of these.
        """
        return {
            **self._rules(),
            "score": self.score,
            "density": self.density,
            "scope": self.scope,
            "refresh_every": self.refresh_every,
            "dense": list(self.dense),
            "frozen": list(self.frozen),
            "seed": self.seed,
        }

    def _rules(self) -> dict[str, str]:
        """The methods that a subclass overrides, by their full names."""
        own = {rule: getattr(type(self), rule) for rule in _RULES}
        return {
            rule: f"{method.__module__}.{method.__qualname__}"
            for rule, method in own.items()
            if method is not getattr(GradientMask, rule)
        }

    def state_dict(self) -> dict[str, Any]:
        """Policy, step counts and, where a selection outlives a step, its packed bits (uint8, by name).

        Where gradients are sharded, the bits are those of this rank's entries: save one state on each rank.

        Raises:
            RuntimeError: if the last step met a gradient that is not finite, and has not said so yet.
        """
        self._flags.raise_if_set()
        by_name = self.masked_parameters
        return {
            "policy": checks.check_policy(self.policy()),
            "steps": {name: self._steps.get(name, 0) for name in by_name},
            "selections": {name: selection.bits for name, selection in self._selections.items()},
            "shards": {name: own_ranges(by_name[name]) for name in self._selections},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: if it was saved under another policy, for other parameters, or by a rank that held other
                entries; says what differs. The mask is then as it was.
        """
        try:
            saved, steps, selections = (dict(state_dict[key]) for key in ("policy", "steps", "selections"))
        except KeyError as error:
            raise ValueError(f"this is no GradientMask state: it lacks {error}") from None
        except (TypeError, ValueError):
            raise ValueError("this is no GradientMask state: load what state_dict() gave") from None
        own, saved = checks.check_policy(self.policy()), checks.check_policy(saved)
        differing = [
            f"{key} is {own.get(key)!r}, was {saved.get(key)!r}"
            for key in {**own, **saved}
            if own.get(key) != saved.get(key)
        ]
        if differing:
            raise ValueError(
                f"the gradient mask differs from the saved one: {'; '.join(differing)}. "
                "Set it as it was, or start a new run"
            )
        bare = self._parameters.translate(steps)
        steps = {bare[name]: count for name, count in steps.items()}
        maskable = self.maskable_parameters
        if not steps or not steps.keys() <= maskable.keys():
            other = sorted(steps.keys() - maskable.keys() or maskable)[0]
            raise ValueError(f"the gradient mask was saved for other parameters, among them '{other}'")
        if odd := sorted(selections.keys() - bare.keys()):
            raise ValueError(f"the gradient mask's state holds a selection of '{odd[0]}', which it does not mask")
        shards = {bare[name]: ranges for name, ranges in (state_dict.get("shards") or {}).items()}
        selections = {bare[name]: bits for name, bits in selections.items()}
        for name, bits in selections.items():
            check_saved_bits(name, bits, maskable[name], shards)
        if self.score == "random" and any(old != new for old, new in bare.items()):
            warnings.warn(
                "the gradient mask was saved under parameter names with what a wrapper put into them, which earlier "
                "releases drew random selections by: from here on, other entries are drawn",
                stacklevel=2,
            )
        # Parameters that were unfrozen before it was saved are masked; those unfrozen since begin at step 0
        self._parameters.masked |= {maskable[name]: name for name in steps}
        self._steps = steps
        self._selections = {
            name: PackedSelection(bits.to(maskable[name].device), own_entries(maskable[name]).shape)
            for name, bits in selections.items()
        }

    def translate_names(self, names: Iterable[str]) -> dict[str, str]:
        """Saved names of parameters to this mask's: those of earlier releases hold what wrappers put into them."""
        return self._parameters.translate(names)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is registered on no optimizer
        return {key: value for key, value in self.__dict__.items() if key not in ("_optimizers", "_flags")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _optimizers=weakref.WeakSet(), _flags=DelayedFlags())


def _first_parameter(optimizer: Optimizer | None) -> Tensor | None:
    groups = [] if optimizer is None else optimizer.param_groups
    return next((p for group in groups for p in group["params"]), None)


def registered_masks(optimizer: Optimizer) -> list[GradientMask]:
    """The masks that act in the steps of an optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    owners = map(owner_of, hooks)
    return [owner for owner in owners if isinstance(owner, GradientMask)]
