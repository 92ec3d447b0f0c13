"""Layers 1 and 2: exact selection on tensors, and the mask that keeps a policy. Imports torch alone."""

from gmt_tune.masking.functional import MaskNumbers, MaskStatistics, kth_largest_magnitude, mask_grads_
from gmt_tune.masking.gradient_mask import GradientMask

__all__ = ["GradientMask", "MaskNumbers", "MaskStatistics", "kth_largest_magnitude", "mask_grads_"]
