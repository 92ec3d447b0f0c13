"""Loss on held-out data, shared among the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchtune import utils

_log = utils.get_logger("INFO")


def tokens_in_loss(labels_BS: Tensor, ignore_index: int) -> Tensor:
    """What a batch's mean loss is weighed by: its labels, counted as torchtune counts them. 0-d, int64.

    That includes a label at a row's first position, which nothing predicts: a batch that has no others counts 0.
    """
    counts_BS = labels_BS != ignore_index
    return counts_BS.sum() * counts_BS[:, 1:].any()


class _RankShare(Dataset):
    """Every ``world_size``-th row, and so many repeated ones at the end that all ranks have as many rows.

    Sharded models need all ranks in each forward pass. Labels of repeated rows are ignored, so that every
    row counts once whatever the number of ranks.
    """

    def __init__(self, dataset, rank: int, world_size: int, ignore_index: int) -> None:
        self._dataset, self._rank, self._world_size = dataset, rank, world_size
        self._ignore_index = ignore_index

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._world_size)

    def __getitem__(self, i: int):
        index = i * self._world_size + self._rank
        if index < len(self._dataset):
            return self._dataset[index]
        row = self._dataset[len(self._dataset) - 1]
        return {**row, "labels": torch.full_like(torch.as_tensor(row["labels"]), self._ignore_index)}


class Validation:
    """Mean loss per token over a data set.

    Args:
        dataset: a torchtune data set, packed or not.
        batch_size: rows per forward pass on each rank.
        collate_fn: makes a batch of rows.
        ignore_index: label of tokens that do not count.
        rank, world_size: of the data-parallel group.
    """

    def __init__(self, dataset, batch_size: int, collate_fn, ignore_index: int, rank: int, world_size: int) -> None:
        share = _RankShare(dataset, rank, world_size, ignore_index)
        # A loader draws a number whenever it starts: from a generator of its own, so that training's stays as it is
        own = torch.Generator()
        self._loader = DataLoader(share, batch_size=batch_size, collate_fn=collate_fn, shuffle=False, generator=own)
        self._ignore_index = ignore_index

    @torch.no_grad()
    def run(self, model, loss_of_batch, device: torch.device) -> float:
        """The loss, the same on all ranks.

        Args:
            model: left in the mode that it was in; no random numbers are drawn.
            loss_of_batch: gives a batch's mean loss per token, any finite number for a batch without a token in the
                loss; it may take entries out of the batch.
            device: of the model.
        """
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in self._loader:
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            tokens = tokens_in_loss(batch["labels"], self._ignore_index)
            loss = loss_of_batch(batch)
            totals += torch.stack((loss.double() * tokens, tokens.double()))
        model.train(was_training)
        dist.all_reduce(totals)
        if totals[1] == 0:
            message = "No token of dataset_val is in the loss, so val_loss is NaN: raise tokenizer.max_seq_len."
            utils.log_rank_zero(_log, message)
        return (totals[0] / totals[1]).item()
