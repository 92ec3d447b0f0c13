"""Data sets and loaders as torchtune's recipes make them, made before the model so that errors come early."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune import config
from torchtune.config._utils import _get_component_from_path
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset

from gmt_tune.data.loading import load_dataset
from gmt_tune.errors import UserError, UserErrorOfOneRank, one_line


def build_tokenizer(cfg_tokenizer: DictConfig):
    """The tokenizer of a config's section. Raises UserError if its file cannot be read, or a value is wrong."""
    try:
        return config.instantiate(cfg_tokenizer)
    except Exception as error:
        raise UserError(f"tokenizer ({cfg_tokenizer._component_}) cannot be made: {one_line(error)[:400]}") from error


def build_dataset(cfg_dataset: DictConfig | ListConfig, tokenizer, key: str = "dataset"):
    """Make the data set of a config's section, or of a list of sections; check its rows, and read the first one.

    Returns (data set, whether it is packed). Raises UserError, which names the file or the row that is wrong.
    """
    if isinstance(cfg_dataset, ListConfig):
        built = [load_dataset(part, tokenizer, f"{key}[{i}]") for i, part in enumerate(cfg_dataset)]
        try:
            dataset = ConcatDataset(datasets=built)
        except ValueError as error:  # packed and others
            raise UserError(f"{key}: {error}") from error
        packed = dataset.packed
    else:
        dataset = load_dataset(cfg_dataset, tokenizer, key)
        packed = cfg_dataset.get("packed", False)
    if len(dataset) == 0:
        raise UserError(f"{key} has no rows: check its source and its filters")
    try:
        dataset[0]
    except UserErrorOfOneRank as error:  # which all ranks meet
        raise UserError(str(error)) from error
    return dataset, packed


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


def to_device(batch, device: torch.device):
    """A batch on a device: tensors, or dicts, tuples and lists of such. To CUDA through pinned memory, without waiting.

    Raises:
        TypeError: if anything else is in it.
    """
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [to_device(value, device) for value in batch]
    if isinstance(batch, Tensor):
        if device.type == "cuda" and batch.is_cpu:
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if hasattr(batch, "to"):  # a BlockMask, which torchtune makes on the device
        return batch.to(device)
    raise TypeError(f"a batch holds tensors, got {type(batch).__name__}: let collate_fn make tensors of it")


def check_enough_rows(n_rows: int, batch_size: int, world_size: int, accumulation: int) -> None:
    """Raise UserError if the training set does not fill a single optimizer step."""
    needed = batch_size * world_size * accumulation
    if n_rows < needed:
        raise UserError(
            f"dataset has {n_rows} rows, but one optimizer step takes {needed} (batch_size {batch_size} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} processes): lower one of them"
        )


def rows_of_batches(dataloader: StatefulDataLoader, batches: Iterable[tuple[int, int]]) -> list[int]:
    """Positions in the data set of the rows of this rank's micro-batches: (epoch, number in it, from 0 on)."""
    sampler, size = dataloader.sampler, dataloader.batch_size
    current_epoch, order = sampler.epoch, {}
    rows: list[int] = []
    for epoch, number in batches:
        if epoch not in order:
            sampler.set_epoch(epoch)
            order[epoch] = list(super(StatefulDistributedSampler, sampler).__iter__())
        rows += order[epoch][number * size : (number + 1) * size]
    sampler.set_epoch(current_epoch)
    return rows
