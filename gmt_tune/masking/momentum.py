"""MomentumResetMask: a gradient mask under which an unselected weight stands still.

GMT masks the gradient, not the update: Adam's first moment goes on moving a weight for some steps after its gradient
was last selected. This variant empties the first moment of what is not selected, to measure how much that matters.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking.gradient_mask import GradientMask
from gmt_tune.masking.optimizers import HookHandles, after_closure, unwrap_optimizer


class MomentumResetMask(GradientMask):
    """A :class:`GradientMask` that also zeroes Adam's first moment (``exp_avg``) of unselected entries.

    It acts right before the optimizer's step, so with weight decay 0 exactly the selected entries change. The second
    moment is left to decay as it does. Arguments are those of :class:`GradientMask`.
    """

    def register(self, optimizer: Optimizer) -> RemovableHandle:
        """As :meth:`GradientMask.register`, for optimizers whose ``exp_avg`` is an ordinary tensor.

        Raises:
            TypeError: at the first step that has a moment to reset, if it is none (torchao's 8-bit state), or
                if the optimizer keeps none (SGD).
        """
        masking = super().register(optimizer)
        return HookHandles(masking, unwrap_optimizer(optimizer).register_step_pre_hook(self._before_masked_step))

    def _before_masked_step(self, optimizer: Optimizer, args: tuple, kwargs: dict):
        # The mask's hook has wrapped a closure already: this one goes around that
        with_closure = after_closure(args, kwargs, lambda is_repeated: self._reset(optimizer))
        if with_closure is None:
            self._reset(optimizer)
        return with_closure

    @torch.no_grad()
    def _reset(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if parameter not in self._names or parameter.grad is None or not state or self.density == 1.0:
                    continue
                moment = state.get("exp_avg")
                if moment is None or type(moment) is not type(parameter.grad):
                    raise TypeError(
                        f"MomentumResetMask needs an optimizer with a plain first moment exp_avg, but "
                        f"{type(optimizer).__name__} has {type(moment).__name__}: use torch.optim.AdamW"
                    )
                moment.mul_(parameter.grad != 0)  # what is not selected has gradient zero by now
