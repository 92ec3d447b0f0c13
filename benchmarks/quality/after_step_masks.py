"""Masks that act after the step of AdamW as well as before it, to tell apart what zeros do inside of it.

Under :class:`~gmt_tune.GradientMask` Adam's moments see zeros where nothing is selected: the first moment moves a
weight on after its last selection, and the second moment forgets how large its gradients are. Under ``SparseAdamMask``
moments and weights stand still there; under ``UpdateMask`` the moments see every gradient, and weights alone stand
still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune import GradientMask
from gmt_tune.masking.flat import FlatShard
from gmt_tune.masking.optimizers import HookHandles, outside_graphs
from gmt_tune.masking.parts import Part
from gmt_tune.masking.selection import Selection


class _RestoringMask(GradientMask):
    """Gives tensors back, after the step, the values they had before it at entries that are not selected.

    Attributes:
        scale: what the change of selected entries is multiplied by.
    """

    scale = 1.0
    _before: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()

    def register(self, optimizer: Optimizer, *, shards: Mapping[Tensor, FlatShard] | None = None) -> RemovableHandle:
        """As of every mask; the optimizer must be a ``torch.optim.AdamW`` in one process, else TypeError."""
        if not isinstance(optimizer, torch.optim.AdamW):
            raise TypeError(f"{type(self).__name__} needs torch.optim.AdamW, got {type(optimizer).__name__}")
        handle = super().register(optimizer, shards=shards)
        return HookHandles(handle, optimizer.register_step_post_hook(outside_graphs(self._restore)))

    def _remember(self, tensor: Tensor, selected: Tensor) -> None:
        self._before += ((tensor, selected, tensor.detach().clone()),)

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for tensor, selected, before in self._before:
            after = tensor if self.scale == 1.0 else before + self.scale * (tensor - before)
            tensor.copy_(torch.where(selected, after, before))
        self._before = ()


class SparseAdamMask(_RestoringMask):
    """Weights and moments of unselected entries stand still, as under ``torch.optim.SparseAdam``.

    Moments are neither decayed nor changed there; bias correction goes by the tensor's steps. Arguments are those of
    :class:`~gmt_tune.GradientMask`.
    """

    def apply_(
        self, parts: Sequence[Part], selections: Sequence[Selection], optimizer: Optimizer | None
    ) -> list[Tensor]:
        """Zero unselected gradients; note what of weights and moments is to stay."""
        for part, selection in zip(parts, selections, strict=True):
            p: Any = part.parameter
            moments = optimizer.state.get(p, {}) if optimizer is not None else {}  # none before the first step
            selected = selection.mask()
            for tensor in (p, *(moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments)):
                self._remember(tensor, selected)
        return super().apply_(parts, selections, optimizer)


class UpdateMask(_RestoringMask):
    """Masks the update instead of the gradient: Adam's moments see the whole gradient, selected weights alone move.

    Arguments are those of :class:`~gmt_tune.GradientMask`.
    """

    def apply_(
        self, parts: Sequence[Part], selections: Sequence[Selection], optimizer: Optimizer | None
    ) -> list[Tensor]:
        """Leave gradients whole; note which weights are to stay."""
        masks = [selection.mask() for selection in selections]
        for part, selected in zip(parts, masks, strict=True):
            self._remember(part.parameter, selected)
        return [selected.sum() for selected in masks]


class ScaledUpdateMask(UpdateMask):
    """An :class:`UpdateMask` that multiplies the updates of selected entries by 1 / density."""

    @property
    def scale(self) -> float:  # type: ignore[override]
        """1 / density."""
        return 1 / self.density

    def policy(self) -> dict[str, object]:
        """The arguments, and that updates are scaled."""
        return super().policy() | {"update_scale": self.scale}
