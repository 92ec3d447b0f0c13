"""Data sets and loaders as torchtune's recipes make them, made before the model so that errors come early."""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig, ListConfig
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune import config
from torchtune.config._utils import _get_component_from_path
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset

from gmt_tune.errors import UserError


def build_tokenizer(cfg_tokenizer: DictConfig):
    """Make the tokenizer of a config's section.

    Raises:
        UserError: if its file cannot be read, or a value is wrong.
    """
    try:
        return config.instantiate(cfg_tokenizer)
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenizer ({cfg_tokenizer._component_}) cannot be made: {message[:400]}") from error


def build_dataset(cfg_dataset: DictConfig | ListConfig, tokenizer, key: str = "dataset"):
    """Make the data set of a config's section and read its first row.

    Args:
        cfg_dataset: one section, or a list of sections that are put together.
        tokenizer: given to each.
        key: of the section, for messages.

    Returns:
        (data set, whether it is packed).

    Raises:
        UserError: if it cannot be loaded, has no rows, or its rows lack a column.
    """
    parts = cfg_dataset if isinstance(cfg_dataset, ListConfig) else [cfg_dataset]
    try:
        built = [config.instantiate(part, tokenizer) for part in parts]
        dataset = ConcatDataset(datasets=built) if isinstance(cfg_dataset, ListConfig) else built[0]
        if len(dataset) == 0:
            raise UserError(f"{key} has no rows: check its source and its filters")
        dataset[0]
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{key}: its rows have no column {error}: set column_map to those that there are") from None
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key} cannot be loaded: {message[:400]}") from error
    if isinstance(cfg_dataset, ListConfig):
        return dataset, getattr(dataset, "packed", False)
    return dataset, cfg_dataset.get("packed", False)


def build_collate(collate_fn: str, packed: bool, pad_id: int, ignore_index: int):
    """The function that makes a batch of rows; packed rows have all the same length and need no padding."""
    if packed:
        return padded_collate_packed
    return partial(_get_component_from_path(collate_fn), padding_idx=pad_id, ignore_idx=ignore_index)


def build_dataloader(dataset, collate, *, batch_size: int, shuffle: bool, rank: int, world_size: int):
    """The loader of one rank's share. The last, smaller batch is dropped, as compiled models want it."""
    sampler = StatefulDistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=0)
    return StatefulDataLoader(
        dataset=dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate, drop_last=True
    )


def check_enough_rows(n_rows: int, batch_size: int, world_size: int, accumulation: int) -> None:
    """Raise UserError if the training set does not fill a single optimizer step."""
    needed = batch_size * world_size * accumulation
    if n_rows < needed:
        raise UserError(
            f"dataset has {n_rows} rows, but one optimizer step takes {needed} (batch_size {batch_size} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} processes): lower one of them"
        )


def rows_of_batches(dataloader: StatefulDataLoader, first: int, stop: int) -> list[int]:
    """Positions in the data set of this rank's micro-batches ``first .. stop - 1`` of the sampler's epoch."""
    order = list(super(StatefulDistributedSampler, dataloader.sampler).__iter__())
    return order[first * dataloader.batch_size : stop * dataloader.batch_size]
