"""GradientMask: the mask as an object with a policy, for any training loop and any optimizer.

It knows which parameters are masked, dense or frozen, counts optimizer steps, keeps the selection between
refreshes and what the last step did. How the largest entries are found is told in ``selection``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking import selection as sel
from gmt_tune.masking.dtensor import any_sharded

# What wrappers put into parameter names. Patterns, and the key of the random score, see the bare name,
# so that switching on compilation or activation checkpointing selects the same entries.
_WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")


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
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them.
        density: fraction of entries that stay, in (0, 1]. 1.0 masks nothing.
        score: what entries are ranked by: "magnitude" (of the gradient), "saliency" (of gradient times
            weight) or "random".
        scope: over what the top fraction is taken: each "tensor", or all masked tensors together ("global").
        refresh_every: optimizer steps between two selections; None selects once, at the first step.
            Selections that outlive a step are kept at 1 bit per entry.
        dense: name patterns (``fnmatch``) of parameters that are updated in full.
        frozen: name patterns of parameters that are not updated at all: they stop requiring gradients.
        seed: of the random score.
        error_if_nonfinite: raise if a gradient holds NaN or infinity, before any weight changes. On CUDA, so as
            not to wait for the device, it is raised at the next step, or when metrics are read.

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

        parameters = _check_named_parameters(named_parameters)
        is_dense = _match("dense", self.dense, parameters)
        is_frozen = _match("frozen", self.frozen, parameters)
        for name in is_dense & is_frozen:
            raise ValueError(f"'{name}' matches both dense and frozen: remove it from one of the two")
        for name in is_frozen:
            parameters[name].requires_grad_(False)
        self._names: dict[Tensor, str] = {
            p: name for name, p in parameters.items() if name not in is_dense and p.requires_grad
        }
        self._known = set(parameters.values())
        if not self._names:
            raise ValueError(
                "no parameter is left to mask: all are dense, frozen, or do not require gradients; "
                "remove patterns from dense and frozen"
            )
        self._steps: dict[str, int] = dict.fromkeys(self._names.values(), 0)
        self._selections: dict[str, Tensor] = {}
        self._seconds: dict[int, float] = {}
        self._unread_flags: tuple[list[str], Tensor, torch.cuda.Event, str] | None = None
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

        With an optimizer per parameter (optimizer in backward), register each of them.

        Args:
            optimizer: any ``torch.optim.Optimizer``.

        Returns:
            A handle; ``handle.remove()`` ends the masking.

        Raises:
            TypeError: if it is no optimizer.
            ValueError: if it holds no parameter of this mask, or only one of several for scope "global".
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"register takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # such as torchao's CPUOffloadOptimizer
            raise TypeError(
                f"{type(optimizer).__name__} runs no step hooks, and moves gradients before they can be masked: to "
                "save memory, use torchao.optim.AdamW8bit or AdamW4bit, or shard with fsdp_cpu_offload: True"
            )
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p in self._known for p in mine):
            raise ValueError(
                "the optimizer holds none of the mask's parameters: make the mask from the "
                "named_parameters() of the model as the optimizer sees it, after wrapping or moving it"
            )
        if self.scope == "global" and not self._names.keys() <= set(mine):
            raise ValueError(
                "scope 'global' needs one optimizer for all masked parameters: "
                "use scope: tensor, or set optimizer_in_bwd: False"
            )
        return optimizer.register_step_pre_hook(self._before_step)

    def mask_grads_(self) -> sel.MaskStatistics:
        """Mask the gradients of all masked parameters, once, in place: for loops without a hook.

        Call it once per optimizer step, after accumulation and clipping.

        Returns:
            What was selected; reading its values waits for the device.
        """
        self._mask(list(self._names), call=0)
        return self.statistics

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        # torch.amp.GradScaler leaves it to fused optimizers to skip a step whose fp16 gradients overflowed, and
        # tells them through this attribute: no weight changes then, so there is nothing to mask or to count.
        overflowed = getattr(optimizer, "found_inf", None)
        if overflowed is not None and overflowed.item():
            return None
        mine = [p for group in optimizer.param_groups for p in group["params"] if p in self._names]
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._mask(mine, call=id(optimizer))
            return None

        # A closure computes the gradients inside step(), after this hook: mask behind it instead.
        def closure_then_mask():
            loss = closure()
            self._mask(mine, call=id(optimizer))
            return loss

        return (args[0], closure_then_mask), {k: v for k, v in kwargs.items() if k != "closure"}

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
        """Time that the host spent on masking the last step."""
        return sum(self._seconds.values())

    def metrics(self) -> dict[str, float]:
        """The last step in numbers for a metric logger. Waits for the device.

        Returns:
            ``mask/density`` (fraction of masked entries that stayed), ``mask/seconds`` (time the host spent
            on it) and, unless the score is random, ``mask/threshold_min``, ``_median`` and ``_max`` over the
            tensors. Empty before the first step.
        """
        self._raise_for_unread_flags()
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
        """Policy, step counts and, where a selection outlives a step, its packed bits (uint8, by name)."""
        return {"policy": self.policy(), "steps": dict(self._steps), "selections": dict(self._selections)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: if it was saved under another policy, or for other parameters; says what differs.
        """
        try:
            saved, steps, selections = (state_dict[key] for key in ("policy", "steps", "selections"))
        except KeyError as error:
            raise ValueError(f"this is no GradientMask state: it lacks {error}") from None
        mine = self.policy()
        differing = [f"{key} is {mine[key]!r}, was {saved.get(key)!r}" for key in mine if mine[key] != saved.get(key)]
        if differing:
            raise ValueError(
                f"the gradient mask differs from the saved one: {'; '.join(differing)}. "
                "Set it as it was, or start a new run"
            )
        if steps.keys() != self._steps.keys():
            odd = sorted(steps.keys() ^ self._steps.keys())[0]
            raise ValueError(f"the gradient mask was saved for other parameters, among them '{odd}'")
        self._steps = dict(steps)
        by_name = {name: p for p, name in self._names.items()}
        self._selections = {name: bits.to(by_name[name].device) for name, bits in selections.items()}

    # ------------------------------------------------------------------ the work

    @torch.no_grad()
    def _mask(self, parameters: list[Tensor], call: int) -> None:
        start = time.perf_counter()
        self._raise_for_unread_flags()
        with_grad = [(self._names[p], p, p.grad) for p in parameters if p.grad is not None]
        if any_sharded(grad for _, _, grad in with_grad):
            self._mask_sharded(with_grad)
        else:
            self._mask_whole(with_grad)
        for p in parameters:
            self._steps[self._names[p]] += 1
        self._seconds[call] = time.perf_counter() - start

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
        """Raise if a flag says that a gradient is not finite: now on the CPU, at the next step on CUDA."""
        where = f" at optimizer step {self.step + 1}"
        if not any(flag.is_cuda for flag in flags):
            sel.raise_for_flags(names, flags, where)
            return
        on_device = torch.stack([flag.to(flags[0].device) for flag in flags])
        on_host = torch.empty(len(flags), dtype=torch.bool, pin_memory=True)
        on_host.copy_(on_device, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(on_device.device))
        self._unread_flags = (names, on_host, arrived, where)

    def _raise_for_unread_flags(self) -> None:
        if self._unread_flags is not None:
            (names, on_host, arrived, where), self._unread_flags = self._unread_flags, None
            arrived.synchronize()  # of the step before: it has long arrived
            sel.raise_for_flags(names, list(on_host), where)

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
            names, where = [name for name, _, _ in ranked], f" at optimizer step {self.step + 1}"
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
        return self.refresh_every is None or self._steps[name] % self.refresh_every != 0

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
        score = self.compute_score(name, parameter, grad)
        if not isinstance(score, Tensor) or score.shape != grad.shape or not score.is_floating_point():
            found = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"compute_score of '{name}' must return a floating-point tensor of shape "
                f"{tuple(grad.shape)}, got {found}"
            )
        return score

    def _draw(self, name: str) -> int:
        """Which random selection is in force: it changes at each refresh, and needs no storing."""
        return 0 if self.refresh_every is None else self._steps[name] // self.refresh_every


def _check_named_parameters(named_parameters) -> dict[str, Tensor]:
    try:
        pairs = [(name, p) for name, p in named_parameters if isinstance(name, str) and isinstance(p, Tensor)]
        count = len(pairs)
    except (TypeError, ValueError):
        count = -1
    if count <= 0:
        raise TypeError("named_parameters must be pairs of name and parameter: pass model.named_parameters()")
    parameters = {bare_name(name): p for name, p in pairs}
    if len(parameters) < count:
        raise ValueError("named_parameters holds the same name twice: pass those of one model")
    return parameters


def bare_name(name: str) -> str:
    """A parameter's name without what activation checkpointing, compiling and the like put into it."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


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


def _match(key: str, patterns: Sequence[str], parameters: dict[str, Tensor]) -> set[str]:
    matched = set()
    for pattern in patterns:
        names = {name for name in parameters if fnmatchcase(name, pattern)}
        if not names:
            some = ", ".join(list(parameters)[:3])
            raise ValueError(f"{key}: the pattern {pattern!r} matches no parameter; names look like {some}")
        matched |= names
    return matched
