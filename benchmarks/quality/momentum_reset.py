"""MomentumResetMask: a gradient mask under which an unselected weight stands still.

GMT masks the gradient, not the update: Adam's first moment goes on moving a weight for some steps after its gradient
was last selected. This variant empties the first moment of what is not selected, to measure how much that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gmt_tune import GradientMask
from gmt_tune.masking.parts import Part
from gmt_tune.masking.selection import Selection


class MomentumResetMask(GradientMask):
    """A :class:`GradientMask` that also zeroes Adam's first moment (``exp_avg``) of unselected entries.

    It acts right before the optimizer's step, so with weight decay 0 exactly the selected entries change. The second
    moment is left to decay as it does. Arguments are those of :class:`GradientMask`; the optimizer's ``exp_avg`` must
    be an ordinary tensor, and the first step that finds none (SGD), or torchao's 8-bit state, raises TypeError.
    """

    def apply_(
        self, parts: Sequence[Part], selections: Sequence[Selection], optimizer: Optimizer | None
    ) -> list[Tensor]:
        """Zero what is not selected, in the gradients and in the first moments."""
        counts = super().apply_(parts, selections, optimizer)
        for part in parts if self.density < 1.0 else ():
            p: Any = part.parameter
            state = optimizer.state.get(p) if optimizer is not None else None
            if not state:
                continue
            moment = state.get("exp_avg")
            if moment is None or type(moment) is not type(p.grad):
                raise TypeError(
                    f"MomentumResetMask needs an optimizer with a plain first moment exp_avg, but "
                    f"{type(optimizer).__name__} has {type(moment).__name__}: use torch.optim.AdamW"
                )
            moment.mul_(p.grad != 0)  # what is not selected has gradient zero by now
        return counts
