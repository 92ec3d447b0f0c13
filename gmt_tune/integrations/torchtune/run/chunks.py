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
    """A batch that the model's output layer runs ``chunks`` times for, on every rank.

    Args:
        batch: ``tokens`` and ``labels``, [batch, sequence]. A packed one has further entries: it is left as it is.
        model: a decoder; nothing is done unless FSDP2 shards its ``output`` by itself.
        chunks: that the loss takes the output in; 0 if it takes it whole.
        pad_id, ignore_index: token and label of what is added.
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
