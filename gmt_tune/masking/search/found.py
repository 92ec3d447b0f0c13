"""What goes into a search and what comes out of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking.parts import Part
from gmt_tune.masking.search.entries import Product

# Entries that are ranked together: what this process holds of each tensor's scores, and the part they belong to.
Set = Sequence[tuple[Tensor | Product, Part]]


class Found(NamedTuple):
    """Of one set.

    Attributes:
        threshold: the k-th largest magnitude, 0-d, in the set's common dtype.
        selected: for each member, how many entries of the whole tensor reach the threshold and are not zero, 0-d
            int64; None where only applying the threshold shows it.
        nonfinite: for each member a 0-d bool tensor: whether its scores hold NaN or infinity; where it is sharded,
            whether its gradient does, on any rank.
        search: what the kernels can use again to apply or pack the threshold, if they found it.
    """

    threshold: Tensor
    selected: list[Tensor | None]
    nonfinite: list[Tensor]
    search: Any = None


def common_dtype(one: Set) -> torch.dtype:
    """In which the entries of a set are compared: theirs, or float32 where they differ."""
    if len(one) == 1:
        return one[0][0].dtype
    dtypes = {score.dtype for score, _ in one}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
