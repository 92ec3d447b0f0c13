"""GradientMask with a full sort of all magnitudes in place of the selection, for configs: the independent answer.

gradient_mask._component_=full_sort_mask.FullSortMask
"""

import full_sort
import torch

from gmt_tune import GradientMask


class FullSortMask(GradientMask):
    """Zeroes what a full sort does not select; scope "tensor", score "magnitude", a selection at each step."""

    def _mask(self, masked, dense, call, *, is_repeated=False):
        with torch.no_grad():
            for p in masked:
                name = self._names[p]
                (kept,) = full_sort.mask([p.grad], self.density)
                p.grad.copy_(kept)
                self._record(name, p.grad, torch.count_nonzero(kept), kept[kept != 0].abs().min())
                self._steps[name] += 1
