"""GradientMask with a full sort of all magnitudes in place of the selection, for configs: the independent answer.

gradient_mask._component_=full_sort_mask.FullSortMask
"""

import full_sort

from gmt_tune import GradientMask
from gmt_tune.masking.packing import pack_selection
from gmt_tune.masking.selection import PackedSelection


class FullSortMask(GradientMask):
    """Selects what a full sort does; scope "tensor", score "magnitude", a selection at each step."""

    def select(self, parts):
        kept = [full_sort.mask([part.local], self.density)[0] for part in parts]
        return [PackedSelection(pack_selection(k != 0), k.shape, k[k != 0].abs().min()) for k in kept]
