"""Keeps ranks together where the output layer is a unit of FSDP2 and runs once for each chunk of the sequence.

``torch.chunk`` makes 7 chunks of 41 positions where it is asked for 8. Every run of a sharded output layer gathers and
reduces, so that ranks whose batches differ in length would wait for each other forever.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def fill_chunks(
    batch: Mapping[str, Tensor], model: nn.Module, chunks: int, pad_id: int, ignore_index: int
) -> Mapping[str, Tensor]:
    """A batch that the model's output layer runs ``chunks`` times for, on every rank; 0 if the loss takes it whole.

    ``batch`` has ``tokens`` and ``labels``, [batch, sequence]; a packed one has further entries and is left as it is.
    So is any batch unless FSDP2 shards the model's ``output`` by itself.
    """
    if not chunks or batch.keys() != {"tokens", "labels"} or not isinstance(getattr(model, "output", None), FSDPModule):
        return batch
    length = batch["tokens"].shape[1]
    missing = filled_length(length, chunks) - length
    if not missing:
        return batch
    return {
        "tokens": F.pad(batch["tokens"], (0, missing), value=pad_id),
        "labels": F.pad(batch["labels"], (0, missing), value=ignore_index),
    }


def filled_length(length: int, chunks: int) -> int:
    """The first length from ``length`` on that ``torch.chunk`` cuts into ``chunks`` parts, not fewer."""
    while -(-length // -(-length // chunks)) < chunks:
        length += 1
    return length
