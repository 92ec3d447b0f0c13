"""What training on pairs of answers needs besides: its own keys of a config, and numbers of held-out pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchtune import config

from gmt_tune.errors import UserError

# Top-level keys that a recipe for supervised fine-tuning does not have.
OWN_KEYS = ("ref_checkpointer",)

_LOSSES = "torchtune.rlhf.loss.DPOLoss or torchtune.rlhf.loss.RSOLoss"
_ROW = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def check_preference_config(cfg: DictConfig) -> None:
    """Check what is special to preference data, in a config that ``check_config`` has passed.

    Raises:
        UserError: names the key, the value, and what would be right.
    """
    if cfg.get("ref_checkpointer", None) is None:
        raise UserError(
            "ref_checkpointer is missing in the config: add a section like checkpointer that names the model before "
            "training, which rewards are measured against (`tune cat quickstart_dpo` shows one)"
        )
    _check_loss(cfg.loss)
    for key in ("dataset", "dataset_val"):
        section = cfg.get(key, None)
        for part in section if isinstance(section, ListConfig) else [section]:
            if part is not None and part.get("packed", False):
                raise UserError(f"{key}.packed: pairs of answers cannot be packed: remove the key")


def _check_loss(cfg_loss: DictConfig) -> None:
    loss = config.instantiate(cfg_loss)
    call = getattr(loss, "forward", loss)
    try:
        inspect.signature(call).bind(*[None] * 4)
    except (TypeError, ValueError):
        raise UserError(
            f"loss._component_ {cfg_loss._component_} is no loss of preferences, which takes the log probabilities of "
            f"the chosen and the rejected answer under both models: set it to {_LOSSES}"
        ) from None
    for key in ("beta", "gamma"):
        value = getattr(loss, key, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"loss.{key} must be a number above 0, such as 0.1, got {value!r}")
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 <= smoothing < 0.5:
        raise UserError(f"loss.label_smoothing must be a number from 0 to below 0.5, got {smoothing!r}")


def check_preference_row(row: object, key: str) -> None:
    """Raise UserError if a row of the config's section ``key`` is no tokenized pair of answers."""
    missing = [name for name in _ROW if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise UserError(
            f"{key} gives rows without {', '.join(missing)}: it must be a data set of preferences, such as "
            "torchtune.datasets.preference_dataset"
        )


class PreferenceValidation:
    """Means over held-out pairs, each counted once whatever the number of ranks.

    Args:
        dataset: rows as ``torchtune.datasets.preference_dataset`` gives them.
        batch_size: pairs per forward pass on each rank.
        collate_fn: makes a batch of rows.
        rank, world_size: of the data-parallel group.
    """

    def __init__(self, dataset, *, batch_size: int, collate_fn, rank: int, world_size: int) -> None:
        # Sharded models need all ranks in each forward pass: the last row is repeated where one has too few.
        last, each = len(dataset) - 1, -(-len(dataset) // world_size)
        share = Subset(dataset, [min(i * world_size + rank, last) for i in range(each)])
        self._not_repeated = len(range(rank, len(dataset), world_size))
        # Its own generator: a loader draws a number at each start, which must not be one of the training's.
        generator = torch.Generator()
        self._batch_size = batch_size
        self._loader = DataLoader(share, batch_size=batch_size, collate_fn=collate_fn, generator=generator)

    @torch.no_grad()
    def run(self, model, numbers_of_batch: Callable[[tuple], Mapping[str, Tensor]], device) -> dict[str, float]:
        """The mean of each number, the same on all ranks.

        Args:
            model: left in the mode that it was in; no random numbers are drawn.
            numbers_of_batch: gives, for a batch, tensors of shape [pairs] by name.
            device: of the model.
        """
        was_training = model.training
        model.eval()
        rows_left, names = self._not_repeated, ()
        totals: Any = 0
        for batch in self._loader:
            numbers = numbers_of_batch(batch)
            names = tuple(numbers)
            rows_NB = torch.stack(list(numbers.values())).double()[:, :rows_left]
            rows_left = max(0, rows_left - self._batch_size)
            totals = totals + torch.cat((rows_NB.sum(dim=1), rows_NB.new_tensor([rows_NB.shape[1]])))
        model.train(was_training)
        totals = totals.to(device)
        dist.all_reduce(totals)
        return dict(zip(names, (totals[:-1] / totals[-1]).tolist(), strict=True))
