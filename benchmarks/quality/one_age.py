"""OneAgeAdamW: compact AdamW with one age for a tensor's entries, to measure what an age for each is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gmt_tune import CompactAdamW
from gmt_tune.masking.parts import Part
from gmt_tune.masking.selection import PlacedSelection


class OneAgeAdamW(CompactAdamW):
    """A :class:`~gmt_tune.CompactAdamW` whose bias correction goes by the tensor's steps since its first selection.

    An entry that is newly selected, with zero moments, is so corrected as little as those that were there before.
    """

    @torch.no_grad()
    def change_selections(
        self,
        parts: Sequence[Part],
        before: Sequence[PlacedSelection | None],
        selections: Sequence[PlacedSelection],
    ) -> None:
        """As of CompactAdamW, and new entries are as old as the tensor."""
        held = [self.state[part.parameter] for part in parts]
        ages = [int(state["age"][0]) if state else 0 for state in held]
        super().change_selections(parts, before, selections)
        for state, age in zip(held, ages, strict=True):
            state["age"].fill_(age)
