"""GradientMask: the mask as an object with a policy, for any training loop and any optimizer.

It knows which parameters are masked, dense or frozen, counts optimizer steps, keeps the selection between
refreshes and what the last step did. How the largest entries are found is told in ``selection``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking import selection as sel
from gmt_tune.masking.delayed import DelayedFlags
from gmt_tune.masking.dtensor import any_sharded
from gmt_tune.masking.names import bare_names
from gmt_tune.masking.optimizers import HookHandles, after_closure, changes_no_weight, check_has_hooks, unwrap_optimizer
from gmt_tune.masking.shards import check_saved_bits, own_entries, own_ranges


def _names_unknown_keys(init: Callable) -> Callable:
    """Let a misspelt keyword fail with the nearest right one; ``inspect.signature`` still sees the original."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        for key, value in kwargs.items():
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean '{nearest[0]}'?" if nearest else f"it takes {', '.join(known[1:])}"
                raise TypeError(f"{type(self).__name__} has no argument '{key}' (given {value!r}): {hint}")
        init(self, *args, **kwargs)

    return checked


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
        dense: name patterns (``fnmatch``) of parameters that are updated in full.
        frozen: name patterns of parameters that are not updated at all: they stop requiring gradients.
        seed: of the random score.
        error_if_nonfinite: raise if the gradient of a masked or dense parameter holds NaN or infinity, before any
            weight changes. On CUDA, so as not to keep the device waiting, the step is launched first, and the same
            call of the optimizer's ``step`` raises behind it: no later code sees its weights.

    Raises:
        TypeError, ValueError: if an argument is out of its range, misspelt, or a pattern matches nothing.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> mask = GradientMask(model.named_parameters(), density=0.2)
        >>> handle = mask.register(optimizer)

    A new score is one method: see :meth:`compute_score`.
    """

    @_names_unknown_keys
    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        density: float,
        *,
        score: str = "magnitude",
        scope: str = "tensor",
        refresh_every: int | None = 1,
        dense: Sequence[str] = (),
        frozen: Sequence[str] = (),
        seed: int = 0,
        error_if_nonfinite: bool = True,
    ) -> None:
        self.density = sel.check_density(density)
        self.scope = sel.check_scope(scope)
        self.score = sel.check_score(score)
        self.refresh_every = _check_refresh_every(refresh_every)
        self.seed = _check_int("seed", seed)
        if not isinstance(error_if_nonfinite, bool):
            raise TypeError(f"error_if_nonfinite must be true or false, got {error_if_nonfinite!r}")
        self.error_if_nonfinite = error_if_nonfinite
        self.dense = _check_patterns("dense", dense)
        self.frozen = _check_patterns("frozen", frozen)

        parameters, self._given_names = _check_named_parameters(named_parameters)
        is_dense = _match("dense", self.dense, self._given_names)
        is_frozen = _match("frozen", self.frozen, self._given_names)
        for name in is_dense & is_frozen:
            raise ValueError(f"'{name}' matches both dense and frozen: remove it from one of the two")
        for name in is_frozen:
            parameters[name].requires_grad_(False)
        self._known = {p: name for name, p in parameters.items()}
        self._dense_names, self._frozen_names = is_dense, is_frozen
        self._names: dict[Tensor, str] = {  # of masked parameters; those that are unfrozen later join them
            p: name for name, p in parameters.items() if name not in is_dense and p.requires_grad
        }
        if not self._names:
            raise ValueError(
                "no parameter is left to mask: all are dense, frozen, or do not require gradients; "
                "remove patterns from dense and frozen"
            )
        self._steps: dict[str, int] = dict.fromkeys(self._names.values(), 0)
        self._selections: dict[str, Tensor] = {}
        self._seconds: dict[int, float] = {}
        self._flags = DelayedFlags()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._grad_scale: Tensor | None = None  # that a fused optimizer will divide gradients by, inside its step
        self._repeats = False  # the closure of one step is called again: its selection stays
        self.statistics = sel.MaskStatistics()

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
        if self.score == "saliency":
            return grad * parameter.detach()
        return grad

    # ------------------------------------------------------------------ use

    def register(self, optimizer: Optimizer) -> RemovableHandle:
        """Mask the gradients of an optimizer's parameters right before each of its steps.

        With an optimizer per parameter (optimizer in backward), register each of them. Parameters that did not
        require gradients when the mask was made, and do later, are masked from then on.

        Args:
            optimizer: any ``torch.optim.Optimizer``, also inside accelerate's or Fabric's wrapper.

        Returns:
            A handle; ``handle.remove()`` ends the masking.

        Raises:
            TypeError: if it is no optimizer, or one that runs no step hooks.
            ValueError: if it has this mask already, or one that masks the same parameters; if it holds no parameter of
                this mask, or one that the mask does not know and whose group does not say ``"gradient_mask": False``;
                for scope "global", if it lacks a masked parameter.
        """
        optimizer = unwrap_optimizer(optimizer)
        check_has_hooks(optimizer)
        for registered in registered_masks(optimizer):
            if registered is self or not self._names.keys().isdisjoint(registered._names):
                which = "this mask" if registered is self else "another gradient mask of the same parameters"
                raise ValueError(
                    f"{which} is registered on the {type(optimizer).__name__} already, and both would act in each "
                    "step: register once, or end the first one with the remove() of the handle that its register "
                    "returned"
                )
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p in self._known for p in held):
            raise ValueError(
                "the optimizer holds none of the mask's parameters: make the mask from the "
                "named_parameters() of the model as the optimizer sees it, after wrapping or moving it"
            )
        self._sort_parameters(optimizer, lambda p: p.requires_grad)
        if self.scope == "global" and (lacking := self._names.keys() - set(held)):
            names = sorted(self._names[p] for p in lacking)
            raise ValueError(
                f"scope 'global' needs one optimizer that holds all masked parameters, and this one lacks '{names[0]}' "
                f"({len(names)} in all): give it all of them, or use scope 'tensor'"
            )
        self._optimizers.add(optimizer)
        return HookHandles(
            optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)
        )

    def mask_grads_(self) -> sel.MaskStatistics:
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
        for p in self._known:
            if p.grad is not None:
                self._join(p)
        self._grad_scale = None
        self._mask(list(self._names), [p for p, name in self._known.items() if name in self._dense_names], call=0)
        self._flags.raise_if_set()
        return self.statistics

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        if changes_no_weight(optimizer):  # so there is nothing to mask or to count
            return None
        grad_scale = getattr(optimizer, "grad_scale", None)
        self._grad_scale = grad_scale if isinstance(grad_scale, Tensor) else None

        def mask(is_repeated: bool) -> None:
            masked, dense = self._sort_parameters(optimizer, lambda p: p.grad is not None)
            self._mask(masked, dense, call=id(optimizer), is_repeated=is_repeated)

        def keep_selection() -> None:
            if self.refresh_every == 1 and not self._draws():
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    if p in self._names and p.grad is not None:
                        self._selections[self._names[p]] = sel.pack_selection(own_entries(p.grad) != 0)

        # A closure computes the gradients inside step(), after this hook: mask behind it instead.
        with_closure = after_closure(args, kwargs, mask, before_second=keep_selection)
        if with_closure is None:
            mask(False)
        return with_closure

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._grad_scale = None
        if self.refresh_every == 1:
            self._selections.clear()  # what the calls of one step's closure had in common
        self._flags.raise_if_set()

    def _sort_parameters(
        self, optimizer: Optimizer, is_trained: Callable[[Tensor], bool]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of an optimizer that are masked, and those that are dense.

        Raises:
            ValueError: if it trains others, which would be updated in full without a word.
        """
        masked, dense, unknown = [], [], []
        for number, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p not in self._known:
                    if is_trained(p) and group.get("gradient_mask") is not False:
                        names = group.get("param_names")
                        unknown.append(f"'{names[i]}'" if names else f"{i} of group {number}, shape {tuple(p.shape)}")
                    continue
                if is_trained(p):
                    self._join(p)
                if p in self._names:
                    masked.append(p)
                elif self._known[p] in self._dense_names:
                    dense.append(p)
        if unknown:
            shown = "; ".join(unknown[:3]) + (f"; and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise ValueError(
                f"the optimizer trains parameters that the gradient mask does not know (parameter {shown}): make the "
                "mask from the named_parameters() of the whole model, after its layers were added, resized or wrapped, "
                "or, to update parameters beside the model in full, give them a parameter group with "
                "'gradient_mask': False"
            )
        return masked, dense

    def _maskable(self) -> dict[str, Tensor]:
        """By name: what is masked, or will be once it requires gradients."""
        unmasked = self._dense_names | self._frozen_names
        return {name: p for p, name in self._known.items() if name not in unmasked}

    def _join(self, p: Tensor) -> None:
        """Mask a parameter from now on that did not require gradients when the mask was made, if it is now trained."""
        name = self._known[p]
        if p in self._names or name in self._dense_names:
            return
        if name in self._frozen_names:
            raise ValueError(
                f"'{name}' is frozen in the gradient mask and requires gradients again: remove its pattern from "
                "frozen, or leave requires_grad off"
            )
        self._names[p] = name
        self._steps[name] = 0

    @property
    def masked_parameters(self) -> dict[str, Tensor]:
        """The parameters that are masked, by name, without what wrappers put into it."""
        return {name: p for p, name in self._names.items()}

    @property
    def step(self) -> int:
        """Optimizer steps that were masked so far."""
        return max(self._steps.values())

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
        if self.statistics.thresholds:
            by_device: dict[torch.device, list[Tensor]] = {}
            for threshold in self.statistics.thresholds.values():
                by_device.setdefault(threshold.device, []).append(threshold.detach().float())
            thresholds = torch.cat([torch.stack(group).cpu() for group in by_device.values()])
            metrics["mask/threshold_min"] = thresholds.min().item()
            metrics["mask/threshold_median"] = thresholds.median().item()
            metrics["mask/threshold_max"] = thresholds.max().item()
        return metrics

    # ------------------------------------------------------------------ state

    def policy(self) -> dict[str, object]:
        """The arguments that decide what is selected, for checkpoints and logs."""
        return {
            "score": self.score,
            "density": self.density,
            "scope": self.scope,
            "refresh_every": self.refresh_every,
            "dense": list(self.dense),
            "frozen": list(self.frozen),
            "seed": self.seed,
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
            "policy": self.policy(),
            "steps": dict(self._steps),
            "selections": dict(self._selections),
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
        mine = self.policy()
        differing = [f"{key} is {mine[key]!r}, was {saved.get(key)!r}" for key in mine if mine[key] != saved.get(key)]
        if differing:
            raise ValueError(
                f"the gradient mask differs from the saved one: {'; '.join(differing)}. "
                "Set it as it was, or start a new run"
            )
        bare = self.translate_names(steps)
        steps = {bare[name]: count for name, count in steps.items()}
        maskable = self._maskable()
        if not steps or not steps.keys() <= maskable.keys():
            other = sorted(steps.keys() - maskable.keys() or self._steps)[0]
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
        self._names |= {maskable[name]: name for name in steps}
        self._steps = dict.fromkeys(self._names.values(), 0) | steps
        self._selections = {name: bits.to(maskable[name].device) for name, bits in selections.items()}

    def translate_names(self, names: Iterable[str]) -> dict[str, str]:
        """Saved names of parameters to this mask's: those of earlier releases hold what wrappers put into them."""
        names = list(names)
        bare = dict(zip(names, bare_names(names), strict=True)) | {n: b for b, n in self._given_names.items()}
        return {name: name if name in self._given_names else bare[name] for name in names}

    def __getstate__(self) -> dict[str, Any]:
        # A copy is registered on no optimizer
        return {key: value for key, value in self.__dict__.items() if key not in ("_optimizers", "_flags")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _optimizers=weakref.WeakSet(), _flags=DelayedFlags())

    # ------------------------------------------------------------------ the work

    @torch.no_grad()
    def _mask(self, masked: list[Tensor], dense: list[Tensor], call: int, *, is_repeated: bool = False) -> None:
        """Mask the gradients of some parameters.

        Args:
            masked, dense: parameters; of dense ones, gradients are only looked at.
            call: whose time this is: an optimizer's.
            is_repeated: this is still the optimizer step of the call before, whose selection stays.
        """
        start = time.perf_counter()
        if not is_repeated:
            self._flags.raise_if_set()
        self._repeats = is_repeated
        names = [self._names[p] for p in masked]
        of_selections = {name: t for name, t in self.statistics.thresholds.items() if name in self._selections}
        if len(masked) == len(self._names):
            self.statistics = sel.MaskStatistics()  # what was given out before stays as it is
        for name in names:
            for numbers in (self.statistics.thresholds, self.statistics.selected, self.statistics.numel):
                numbers.pop(name, None)
        if self.error_if_nonfinite:
            self._check_dense({self._known[p]: p for p in dense if p.grad is not None})
        with_grad = [(name, p, p.grad) for name, p in zip(names, masked, strict=True) if p.grad is not None]
        if any_sharded(grad for _, _, grad in with_grad):
            self._mask_sharded(with_grad)
        else:
            self._mask_whole(with_grad)
        for name in names:
            self._steps[name] += not is_repeated
            if name in self.statistics.selected and name in of_selections:  # a kept selection keeps its threshold
                self.statistics.thresholds.setdefault(name, of_selections[name])
        self._seconds[call] = time.perf_counter() - start

    def _check_dense(self, parameters: dict[str, Tensor]) -> None:
        """Raise if a gradient of these, which have one, is not finite."""
        grads: Any = [p.grad for p in parameters.values()]
        if any_sharded(grads):
            from gmt_tune.masking import sharded

            sharded.reduce_partial_sums_(parameters.values())
            grads = {name: p.grad for name, p in parameters.items()}
            sharded.raise_if_nonfinite(grads, self._where())
        else:
            self._check_flags(list(parameters), sel.nonfinite_flags(grads))

    def _where(self) -> str:
        return f" at optimizer step {self.step + (not self._repeats)}"

    def _mask_whole(self, with_grad: list[tuple[str, Tensor, Tensor]]) -> None:
        reuse: list[tuple[str, Tensor, Tensor]] = []
        fresh: list[tuple[str, Tensor, Tensor]] = []
        for entry in with_grad if self.density < 1.0 else ():
            (reuse if self._keeps_selection(entry[0]) else fresh).append(entry)
        measured = None
        if fresh and self._ranks_gradients():
            # Measuring tells on the way whether a gradient is finite: no entry is read once more for it.
            measured = sel.measure([grad for _, _, grad in fresh], self.density, self.scope)
        if self.error_if_nonfinite:
            names = {name for name, _, _ in fresh} if measured is not None else ()
            others = {name: grad for name, _, grad in with_grad if name not in names}
            flags = sel.nonfinite_flags(list(others.values())) + (measured.nonfinite if measured is not None else [])
            self._check_flags([*others, *(name for name, _, _ in fresh if name in names)], flags)
        for name, _, grad in reuse:
            self._record(name, grad, sel.apply_packed_(grad, self._selections[name]))
        if measured is not None:
            grads = [grad for _, _, grad in fresh]
            self._apply(fresh, grads, measured.thresholds, measured.selected)
        elif fresh:
            self._select(fresh)
        for name, _, grad in with_grad if self.density == 1.0 else ():
            self._record(name, grad, torch.tensor(grad.numel()))

    def _check_flags(self, names: list[str], flags: list[Tensor]) -> None:
        """Raise if a flag says that a gradient is not finite: now on the CPU, behind the step on CUDA."""
        self._flags.add(names, flags, self._where())

    def _mask_sharded(self, with_grad: list[tuple[str, Tensor, Tensor]]) -> None:
        """The same for gradients of which this rank holds a part; all ranks call it with the same parameters."""
        from gmt_tune.masking import sharded

        sharded.reduce_partial_sums_(p for _, p, _ in with_grad)
        with_grad = [(name, p, p.grad) for name, p, _ in with_grad if p.grad is not None]
        reuse: list[tuple[str, Tensor, Tensor]] = []
        drawn: list[tuple[str, Tensor, Tensor]] = []
        ranked: list[tuple[str, Tensor, Tensor]] = []
        for entry in with_grad if self.density < 1.0 else ():
            fresh = drawn if self._draws() else ranked
            (reuse if self._keeps_selection(entry[0]) else fresh).append(entry)
        check = None
        if self.error_if_nonfinite:
            names, where = [name for name, _, _ in ranked], self._where()
            check = functools.partial(sel.raise_for_flags, names, where=where)  # rides on what ranking sends
            sharded.raise_if_nonfinite({name: grad for name, _, grad in with_grad if name not in names}, where)
        if ranked:
            rankings = [self._ranking(sharded, *entry) for entry in ranked]
            thresholds, counts = sharded.measure(rankings, self.density, self.scope, check)
            kept = sharded.apply_(rankings, thresholds, pack=self.refresh_every != 1)
            self._selections.update(zip((name for name, _, _ in ranked), kept, strict=False))
            for (name, _, grad), count, threshold in zip(ranked, counts, thresholds, strict=True):
                self._record(name, grad, count, threshold)
        counts = [sel.apply_packed_(sharded.local_part(grad), self._selections[name]) for name, _, grad in reuse]
        for name, _, grad in drawn:
            key = sel.random_key(self.seed, self._draw(name), name)
            counts.append(sharded.apply_random_(grad, self.density, key))
        counts = sharded.sum_counts([grad for _, _, grad in reuse + drawn], counts)
        for (name, _, grad), count in zip(reuse + drawn, counts, strict=True):
            self._record(name, grad, count)
        for name, _, grad in with_grad if self.density == 1.0 else ():
            self._record(name, grad, torch.tensor(grad.numel()))

    def _keeps_selection(self, name: str) -> bool:
        if name not in self._selections:
            return False
        return self._repeats or self.refresh_every is None or self._steps[name] % self.refresh_every != 0

    def _select(self, entries: list[tuple[str, Tensor, Tensor]]) -> None:
        """Make a new selection for these (name, parameter, gradient) by another score, and apply it."""
        if self._draws():
            for name, _, grad in entries:
                key = sel.random_key(self.seed, self._draw(name), name)
                self._record(name, grad, sel.apply_random_(grad, self.density, key))
        elif self.scope == "global" or self._ranks_by_saliency():
            scores = [self._score(*entry) for entry in entries]
            self._apply(entries, scores, sel.measure_thresholds(scores, self.density, self.scope))
        else:  # a tensor at a time: no more than one score is alive
            for entry in entries:
                scores = [self._score(*entry)]
                self._apply([entry], scores, sel.measure_thresholds(scores, self.density, "tensor"))

    def _apply(self, entries, scores, thresholds, selected=None) -> None:
        if self.refresh_every != 1:
            for (name, _, _), score, threshold in zip(entries, scores, thresholds, strict=True):
                self._selections[name] = sel.pack_selected(score, threshold)
        grads = [grad for _, _, grad in entries]
        own_scores = None if all(s is g for s, g in zip(scores, grads, strict=True)) else scores
        counts = sel.apply_thresholds_(grads, thresholds, own_scores, selected=selected)
        for (name, _, grad), count, threshold in zip(entries, counts, thresholds, strict=True):
            self._record(name, grad, count, threshold)

    def _record(self, name: str, grad: Tensor, count: Tensor, threshold: Tensor | None = None) -> None:
        self.statistics.selected[name] = count
        self.statistics.numel[name] = grad.numel()
        if threshold is not None:
            if self._grad_scale is not None and type(self).compute_score is GradientMask.compute_score:
                threshold = threshold.float() / self._grad_scale.to(threshold.device)
            self.statistics.thresholds[name] = threshold

    def _draws(self) -> bool:
        return self.score == "random" and type(self).compute_score is GradientMask.compute_score

    def _ranks_gradients(self) -> bool:
        return self.score == "magnitude" and type(self).compute_score is GradientMask.compute_score

    def _ranks_by_saliency(self) -> bool:
        return self.score == "saliency" and type(self).compute_score is GradientMask.compute_score

    def _ranking(self, sharded, name: str, parameter: Tensor, grad: Tensor):
        if self._ranks_gradients():
            return sharded.ranked_by_gradient(grad)
        if self._ranks_by_saliency():
            return sharded.ranked_by_saliency(grad, parameter)
        return sharded.ranked_by(grad, self._checked_score(name, parameter, grad))

    def _score(self, name: str, parameter: Tensor, grad: Tensor) -> Tensor | sel.Saliency:
        if self._ranks_by_saliency():
            return sel.Saliency(grad, parameter)
        return self._checked_score(name, parameter, grad)

    def _checked_score(self, name: str, parameter: Tensor, grad: Tensor) -> Tensor:
        unscaled = grad
        if self._grad_scale is not None:  # float16 would underflow
            unscaled = (grad.float() if grad.dtype == torch.float16 else grad) / self._grad_scale.to(grad.device)
        score = self.compute_score(name, parameter, unscaled)
        if not isinstance(score, Tensor) or score.shape != grad.shape or not score.is_floating_point():
            found = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"compute_score of '{name}' must return a floating-point tensor of shape "
                f"{tuple(grad.shape)}, got {found}"
            )
        return score

    def _draw(self, name: str) -> int:
        """Which random selection is in force: it changes at each refresh, and needs no storing."""
        return 0 if self.refresh_every is None else (self._steps[name] - self._repeats) // self.refresh_every


def registered_masks(optimizer: Optimizer) -> list[GradientMask]:
    """The masks that act in the steps of an optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, GradientMask)]


def _check_named_parameters(named_parameters) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters by their bare names, and the names as they were given."""
    try:
        pairs = [(name, p) for name, p in named_parameters if isinstance(name, str) and isinstance(p, Tensor)]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        raise TypeError("named_parameters must be pairs of name and parameter: pass model.named_parameters()")
    for name, p in pairs:
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"'{name}' was flattened by FSDP version 1, so that its entries are no tensor with a threshold: "
                "shard with torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    parameters: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    seen = set()
    for name, (given_name, p) in zip(bare_names([name for name, _ in pairs]), pairs, strict=True):
        if p in seen:  # tied, with remove_duplicate=False
            continue
        if name in parameters:
            raise ValueError(f"named_parameters holds the name '{name}' twice: pass those of one model")
        seen.add(p)
        parameters[name], given[name] = p, given_name
    return parameters, given


def _check_int(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be a whole number, got {value!r}")
    return value


def _check_refresh_every(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"refresh_every must be a whole number of optimizer steps from 1 on, or null to select once, got {value!r}"
        )
    return value


def _check_patterns(key: str, patterns: Any) -> tuple[str, ...]:
    if patterns is None:
        return ()
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f'{key} must be a list of name patterns such as ["*norm*"], got {patterns!r}')
    return tuple(patterns)


def _match(key: str, patterns: Sequence[str], given_names: dict[str, str]) -> set[str]:
    """The bare names that a pattern matches, as they are or as they were given."""
    matched = set()
    for pattern in patterns:
        names = {
            name for name, given in given_names.items() if fnmatchcase(name, pattern) or fnmatchcase(given, pattern)
        }
        if not names:
            some = ", ".join(list(given_names)[:3])
            raise ValueError(f"{key}: the pattern {pattern!r} matches no parameter; names look like {some}")
        matched |= names
    return matched
