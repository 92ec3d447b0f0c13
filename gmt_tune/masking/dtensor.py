"""Tells sharded tensors from whole ones without importing DTensor, which takes a second."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a DTensor: then ``gmt_tune.masking.sharded`` masks them all."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: nothing can be one
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)
