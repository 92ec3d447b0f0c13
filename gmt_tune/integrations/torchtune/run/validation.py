"""Numbers of held-out data, shared among the ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchtune import utils

_log = utils.get_logger("INFO")


def tokens_in_loss(labels_BS: Tensor, ignore_index: int) -> Tensor:
    """What a batch's mean loss is weighed by: its labels, counted as torchtune counts them. 0-d, int64.

    That includes a label at a row's first position, which nothing predicts: a batch that has no others counts 0.
    """
    counts_BS = labels_BS != ignore_index
    return counts_BS.sum() * counts_BS[:, 1:].any()


class Validation:
    """Means over held-out rows, each counted once whatever the number of data-parallel ranks."""

    def __init__(self, dataset, *, batch_size: int, collate_fn, rank: int, world_size: int) -> None:
        # Sharded models need all ranks in each forward pass: the last row is repeated where a rank has too few.
        last, each = len(dataset) - 1, -(-len(dataset) // world_size)
        share = Subset(dataset, [min(i * world_size + rank, last) for i in range(each)])
        self._not_repeated = len(range(rank, len(dataset), world_size))
        # A loader draws a number whenever it starts: from a generator of its own, so that training's stays as it is
        own = torch.Generator()
        self._batch_size = batch_size
        self._loader = DataLoader(share, batch_size=batch_size, collate_fn=collate_fn, generator=own)

    @torch.no_grad()
    def run(self, model, sums_of: Callable[[object, int], Mapping[str, Tensor]], device) -> dict[str, float]:
        """The mean of each number, the same on all ranks. The model's mode and all random numbers stay as they are.

        ``sums_of`` gives, for a batch and how many of its first rows count, sums over these by name, 0-d, and what they
        are divided by as the last of them.
        """
        was_training = model.training
        model.eval()
        rows_left, names = self._not_repeated, ()
        totals: Any = 0
        for batch in self._loader:
            sums = sums_of(batch, min(rows_left, self._batch_size))
            rows_left = max(0, rows_left - self._batch_size)
            names = tuple(sums)[:-1]
            totals = totals + torch.stack([value.double() for value in sums.values()])
        model.train(was_training)
        totals = totals.to(device)
        dist.all_reduce(totals)
        *means, weight = torch.cat((totals[:-1] / totals[-1], totals[-1:])).tolist()
        if weight == 0:
            message = "No token of dataset_val is in the loss, so val_loss is NaN: raise tokenizer.max_seq_len."
            utils.log_rank_zero(_log, message)
        return dict(zip(names, means, strict=True))
