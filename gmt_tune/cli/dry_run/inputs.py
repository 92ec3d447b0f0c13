"""What a dry run reads in place of a config's own sections: the first rows of a data set, and of its packs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any
from unittest import mock

from omegaconf import OmegaConf
from torch.utils.data import Dataset, Subset
from torchtune import config
from torchtune.datasets import PackedDataset

PACKS = 16


def first_rows(tokenizer: Any, *, of: Mapping[str, Any], rows: int | None = None, packed: bool = False) -> Dataset:
    """A data set of a config's section, or its first rows; of a packed one, no more than :data:`PACKS` are filled.

    Args:
        tokenizer: of the run.
        of: the section.
        rows: None for all.
        packed: as in the section.
    """
    whole = partialmethod(PackedDataset.__init__, max_packs=PACKS)
    with mock.patch.object(PackedDataset, "__init__", whole):
        dataset = config.instantiate(OmegaConf.create(dict(of)), tokenizer)
    return dataset if rows is None or rows >= len(dataset) else Subset(dataset, range(rows))
