"""HalfMask: half fine-tuning, a baseline that freezes a random half of the matrices and draws again at an interval.

After Hui et al., "HFT: Half Fine-Tuning for Large Language Models" (arXiv 2404.18466). It is a ``GradientMask``
whose unit of selection is a whole tensor, so that it stands in a config wherever that one does.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from gmt_tune import GradientMask
from gmt_tune.masking.parameters import DEFAULT_DENSE
from gmt_tune.masking.parts import Part
from gmt_tune.masking.selection import Selection, WholeSelection


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
        dense: Sequence[str] = DEFAULT_DENSE,
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
        self._shapes = {name: tuple(p.shape) for name, p in self.maskable_parameters.items()}
        self.updated = functools.lru_cache(maxsize=2)(self._draw_half)

    def policy(self) -> dict[str, object]:
        """The arguments that decide what is drawn, for checkpoints and logs."""
        return super().policy() | {"unit": "tensor"}

    def select(self, parts: Sequence[Part]) -> list[Selection]:
        """All entries of the tensors that are updated in this step's interval, and none of the others."""
        return [WholeSelection(part, part.name in self.updated(self.draw(part.name))) for part in parts]

    def apply_(self, parts: Sequence[Part], selections: Sequence[Any], optimizer: Any) -> list[Tensor]:
        """Set the gradients of the tensors that are not updated to None."""
        counts = [selection.count for selection in selections]
        for part, selection in zip(parts, selections, strict=True):
            if not selection.is_selected:
                part.parameter.grad = None
        return counts

    def _draw_half(self, draw: int) -> frozenset[str]:
        """Names of the tensors that are updated in the draw-th interval, counted from 0."""
        rng = random.Random(f"{self.seed}/{draw}")
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, shape in self._shapes.items():
            by_shape.setdefault(shape, []).append(name)
        drawn: list[str] = []
        for names in by_shape.values():
            size = (len(names) + rng.randrange(2)) // 2
            drawn += rng.sample(sorted(names), size)
        return frozenset(drawn)
