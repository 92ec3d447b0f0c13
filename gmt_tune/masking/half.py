"""HalfMask: half fine-tuning, a baseline that freezes a random half of the matrices and draws anew at an interval.

After Hui et al., "HFT: Half Fine-Tuning for Large Language Models" (arXiv 2404.18466). It is a ``GradientMask``
whose unit of selection is a whole tensor, so that it stands in a config wherever that one does.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gmt_tune.masking import selection as sel
from gmt_tune.masking.gradient_mask import GradientMask


class HalfMask(GradientMask):
    """Leaves out, at each optimizer step, a random half of the tensors; the others are updated in full.

    Tensors of the same shape are drawn from together, so that a half of the tensors is also about a half of the
    entries; of an odd number, a coin decides on the last. The gradient of a frozen tensor is set to None rather than
    zeroed: PyTorch's and torchao's optimizers then skip it, so neither momentum nor weight decay moves it, and its
    optimizer state stands still until it is drawn again.

    Args:
        named_parameters: pairs of name and parameter, as ``model.named_parameters()`` gives them.
        refresh_every: optimizer steps between two draws; None draws once, at the first step.
        seed: of the draws, which are the same on every rank and after a restart.
        dense: name patterns (``fnmatch``) of parameters that are always updated.
        frozen: name patterns of parameters that are never updated: they stop requiring gradients.
        error_if_nonfinite: raise if a gradient holds NaN or infinity, before any weight changes.

    Raises:
        TypeError, ValueError: if an argument is out of its range, misspelt, or a pattern matches nothing.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        refresh_every: int | None = 100,
        seed: int = 0,
        dense: Sequence[str] = (),
        frozen: Sequence[str] = (),
        error_if_nonfinite: bool = True,
    ) -> None:
        super().__init__(
            named_parameters,
            density=0.5,
            score="random",
            refresh_every=refresh_every,
            dense=dense,
            frozen=frozen,
            seed=seed,
            error_if_nonfinite=error_if_nonfinite,
        )
        # Also of those that do not require gradients yet: a draw does not depend on when a layer is unfrozen
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._maskable().items()}
        self._drawn = functools.lru_cache(maxsize=2)(self._draw_half)

    def policy(self) -> dict[str, object]:
        """The arguments that decide what is drawn, for checkpoints and logs."""
        return super().policy() | {"unit": "tensor"}

    def updated(self, draw: int) -> frozenset[str]:
        """Names of the tensors that are updated in the draw-th interval, counted from 0."""
        return self._drawn(draw)

    def _draw_half(self, draw: int) -> frozenset[str]:
        rng = random.Random(f"{self.seed}/{draw}")
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, shape in self._shapes.items():
            by_shape.setdefault(shape, []).append(name)
        drawn: list[str] = []
        for names in by_shape.values():
            size = (len(names) + rng.randrange(2)) // 2
            drawn += rng.sample(sorted(names), size)
        return frozenset(drawn)

    def _mask_whole(self, with_grad: list[tuple[str, Tensor, Tensor]]) -> None:
        if self.error_if_nonfinite:
            grads = [grad for _, _, grad in with_grad]
            self._check_flags([name for name, _, _ in with_grad], sel.nonfinite_flags(grads))
        self._freeze(with_grad)

    def _mask_sharded(self, with_grad: list[tuple[str, Tensor, Tensor]]) -> None:
        if self.error_if_nonfinite:
            from gmt_tune.masking import sharded

            sharded.raise_if_nonfinite({name: grad for name, _, grad in with_grad}, self._where())
        self._freeze(with_grad)

    def _freeze(self, with_grad: list[tuple[str, Tensor, Tensor]]) -> None:
        for name, parameter, grad in with_grad:
            is_updated = name in self.updated(self._draw(name))
            if not is_updated:
                parameter.grad = None
            self._record(name, grad, torch.tensor(grad.numel() if is_updated else 0))
