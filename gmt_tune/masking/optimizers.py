"""Optimizers as hooks meet them: inside wrappers, with closures, with more than one hook to remove, and compact."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking.parts import Part
from gmt_tune.masking.selection import PlacedSelection


class CompactOptimizer(Optimizer):
    """An optimizer that keeps gradients and states of selected entries alone; a mask decides which these are.

    The mask calls ``add_gradient`` and ``change_selections``, in backward passes and right before a step; a
    checkpoint ``load_compact_state``; the rest is for training loops, which do not find the gradients of most
    parameters in ``grad``.

    Attributes:
        max_grad_norm: to which the step clips what it applies, or None; infinity measures alone.
        grad_norm: the norm of that before clipping, at the last step, 0-d; None without ``max_grad_norm``.
    """

    max_grad_norm: float | None = None
    grad_norm: Tensor | None = None

    def add_gradient(self, part: Part, selection: PlacedSelection | None) -> None:
        """Take in, from one backward pass, what a gradient has at the selected entries; None before the first turn."""
        raise NotImplementedError

    def change_selections(
        self,
        parts: Sequence[Part],
        before: Sequence[PlacedSelection | None],
        selections: Sequence[PlacedSelection],
    ) -> None:
        """Take in whole gradients that got a new selection. States of entries that stay selected stay."""
        raise NotImplementedError

    def nonfinite(self) -> list[tuple[Part, Tensor]]:
        """What was taken in, and whether the gradient that this process held was not finite anywhere: 0-d bool."""
        raise NotImplementedError

    def load_compact_state(self, p: Tensor, key: str, values: Tensor, count: int) -> None:
        """Take in a saved state of a parameter's selected entries; a checkpoint calls it, behind the mask's own state.

        Args:
            p: the parameter.
            key: of the state, such as "exp_avg".
            values: 1-d, of the selected entries that this process holds, as they were saved: quantized or not, and
                maybe with padding behind them.
            count: how many these are.
        """
        raise NotImplementedError

    def scale_gradients_(self, factor: Tensor | float) -> None:
        """Multiply what was taken in and waits for the step, as a loop does that normalises after backward."""
        raise NotImplementedError


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside wrappers that step it, such as accelerate's and Fabric's, whose own hooks do not run."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_has_hooks(optimizer: Any) -> None:
    """Raise TypeError unless it is a ``torch.optim.Optimizer`` that runs step hooks; the message names the remedy."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return
    if type(optimizer).__module__.startswith("deepspeed."):
        raise TypeError(f"{kind} steps flat tensors: use gmt_tune.integrations.deepspeed.register(mask, engine)")
    inside = getattr(optimizer, "__dict__", {}).items()
    inner = next((name for name, value in inside if isinstance(value, Optimizer)), None)
    if inner is not None:
        raise TypeError(f"{kind} runs no step hooks: register the optimizer inside it, register(optimizer.{inner})")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"register takes a torch.optim.Optimizer, got {kind}")
    if kind == "CPUOffloadOptimizer":
        raise TypeError(
            f"{kind} runs no step hooks, and moves gradients before they can be masked: to save memory, use "
            "torchao.optim.AdamW8bit or AdamW4bit, or shard with fsdp_cpu_offload: True"
        )
    raise TypeError(f"{kind} runs no step hooks, so its gradients cannot be masked: call mask_grads_() before its step")


def outside_graphs(hook: Callable) -> Callable:
    """A step hook that ``torch.compile(optimizer.step)`` does not look into: it is one graph break, and compiled once.

    To be made where it is registered: it loads the compiler, as each optimizer does, and takes seconds for it.
    """
    return torch.compiler.disable(hook)


def owner_of(hook: Callable) -> Any:
    """Whose method a hook is, also one made by :func:`outside_graphs`; None if it is no method."""
    return getattr(inspect.unwrap(hook), "__self__", None)


def changes_no_weight(optimizer: Optimizer) -> bool:
    """Whether the step that a pre-hook was called for is none of its own. Call it from the hook itself.

    - ``torch.amp.GradScaler`` leaves it to fused optimizers to skip a step whose gradients overflowed, and says so by
      an attribute. Reading it waits for the device.
    - Where a subclass's ``step`` calls that of its base class, PyTorch runs all hooks for both.
    """
    overflowed = getattr(optimizer, "found_inf", None)
    if overflowed is not None and overflowed.item():
        return True
    step = None  # what runs the hooks, around each step: the first frame of the optimizer's, behind torch.compile's own
    frame = sys._getframe(2)
    while frame is not None:
        if (step is None or frame.f_code is step) and frame.f_locals.get("self") is optimizer:
            if step is not None:
                return True
            step = frame.f_code
        frame = frame.f_back
    return False


def after_closure(
    args: tuple, kwargs: dict, action: Callable[[bool], None], before_second: Callable[[], None] | None = None
) -> tuple[tuple, dict] | None:
    """Let an action follow each call of the closure that was given to ``step``, which computes the gradients.

    Args:
        args, kwargs: of the step, as a step pre-hook gets them.
        action: gets whether the closure was called before in this step, as a line search does.
        before_second: called before the closure's second call, while the first call's gradients are there.

    Returns:
        What the pre-hook returns to replace the arguments; None where no closure was given.
    """
    is_keyword = callable(kwargs.get("closure"))
    if not is_keyword and not (len(args) > 1 and callable(args[1])):
        return None
    closure = kwargs["closure"] if is_keyword else args[1]
    calls = 0

    def closure_then_action(*closure_args, **closure_kwargs):
        nonlocal calls
        if calls == 1 and before_second is not None:
            before_second()
        loss = closure(*closure_args, **closure_kwargs)
        action(calls > 0)
        calls += 1
        return loss

    if is_keyword:
        return args, {**kwargs, "closure": closure_then_action}
    return (args[0], closure_then_action, *args[2:]), kwargs


class HookHandles(RemovableHandle):
    """Several hooks in one handle."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles
        self.id = handles[0].id

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict:
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
