"""Rows of a data set that say which of them is wrong, and why: before training where that costs little.

torchtune prepares a row when its turn comes, which may be hours after the start, and its errors name no row. Some
faults raise no error at all: in a chat, torchtune takes a message whose content is null for a copy of the one before.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import datasets  # type: ignore[import-untyped]
from torch.utils.data import Dataset
from torchtune.datasets import ConcatDataset, PackedDataset, PreferenceDataset, SFTDataset, TextCompletionDataset

from gmt_tune.data.columns import REMEDY, Fault, RowCheck, columns_of
from gmt_tune.data.scan import RowFiles, WrongRows, absent_column, count_wrong, sentence
from gmt_tune.errors import UserError, UserErrorOfOneRank, one_line

# The first rows, which are checked before training: some seconds' worth. Later rows are checked when they are read.
ROWS_CHECKED_AHEAD = 100_000


class CheckedRows(Dataset):
    """A data set whose errors name the row and what is wrong with it; the rows themselves stay as they are.

    Args:
        dataset (Dataset): torchtune's, or any other, whose rows are not checked.
        key (str): the config's section, which messages name.
        origin (object): where it is from, for messages; default None, which leaves it out.
        files (RowFiles | None): the local files that it was read from; default None.
    """

    def __init__(self, dataset: Dataset, key: str, origin: object = None, files: RowFiles | None = None) -> None:
        self._dataset, self._key, self._files = dataset, key, files
        self._name = key if origin is None else f"{key} ({origin})"
        self._seen_in = "" if origin is None else f" (seen in {origin})"
        # As it was loaded, where torchtune's own code prepares one row of it at a time
        own = (SFTDataset, PreferenceDataset, TextCompletionDataset)
        is_torchtunes = any(type(dataset).__getitem__ is kind.__getitem__ for kind in own)
        raw: Any = getattr(dataset, "_data", None)
        self._raw: Any = raw if is_torchtunes and isinstance(raw, datasets.Dataset) else None
        transform: Any = getattr(dataset, "_message_transform", None)
        tokenizer = getattr(dataset, "_model_transform", None) or getattr(dataset, "_tokenizer", None)
        self._check = RowCheck(
            columns_of(dataset),
            getattr(tokenizer, "check_messages", None),  # gmt-tune's tokenizers have it
            compares_pairs=files is not None,  # a published set may have such pairs, and its user cannot correct it
        )
        code = [part for part in (dataset, transform) if part is not None]
        self._is_torchtunes = all(type(part).__module__.startswith("torchtune.") for part in code)

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        try:
            if self._raw is None:
                return self._dataset[index]
            sample = self._raw[index]
            fault = self._check.fault_of(sample)
            if fault is None:
                return self._dataset._prepare_sample(sample)  # type: ignore[attr-defined]
        except (UserError, OSError):
            raise
        except Exception as error:
            remedy = REMEDY if self._is_torchtunes else "the data set's own code failed on it"
            raise UserErrorOfOneRank(self._sentence(index, Fault(_in_words(error), remedy))) from error
        raise UserErrorOfOneRank(self._sentence(index, fault))

    def check(self, rows: int | None = ROWS_CHECKED_AHEAD) -> None:
        """Check the first rows (None: all) without tokenizing them. UserError names the first that is wrong."""
        if self._raw is None:
            return
        absent = absent_column(self._check.columns, self._raw.column_names, self._key)
        if absent is not None:
            raise UserError(absent + self._seen_in)
        samples = enumerate(islice(self._raw, rows))  # in order, which is faster than by index
        for index, sample in samples:
            fault = self._check.fault_of(sample)
            if fault is not None:
                raise UserError(self._sentence(index, fault, count_wrong(self._check, samples)))

    def _sentence(self, index: int, fault: Fault, others: WrongRows | None = None) -> str:
        place = self._files.place_of(index) if self._files is not None else None
        name = self._name if place is None else self._key
        return sentence(index, name, place, fault, islice(self._raw, 1000) if self._raw is not None else (), others)


def rows_of_pack(packed: PackedDataset, index: int) -> range:
    """The rows that are in a pack, wholly or in part."""
    # Positions count from 0 in each row, and go on behind the last one, in the padding
    begin = [int((pack["input_pos"] == 0).sum()) for pack in packed.packs[: index + 1]]
    goes_on = bool(packed.packs[index]["input_pos"][0] != 0)
    return range(sum(begin[:-1]) - goes_on, sum(begin))


def positions_in_words(dataset: Dataset, positions: Sequence[int]) -> str:
    """Positions in a data set as messages name them: rows, or for packed ones, packs and the rows in them."""
    parts: list = dataset._datasets if isinstance(dataset, ConcatDataset) else [dataset]
    if not all(isinstance(part, PackedDataset) for part in parts):
        return f"rows {list(positions)} of the data set"
    ranges, first_pack, first_row = [], 0, 0
    for part in parts:
        for position in positions:
            if 0 <= position - first_pack < len(part):
                rows = rows_of_pack(part, position - first_pack)
                first, last = first_row + rows[0], first_row + rows[-1]
                ranges.append(f"{first}-{last}" if last > first else f"{first}")
        first_pack, first_row = first_pack + len(part), first_row + len(part.ds)
    return f"packs {list(positions)} of the data set (rows {', '.join(ranges)})"


def cause_in_words(error: BaseException) -> str:
    """Why a data set could not be loaded: ``datasets`` often raises a general error from the one that says why."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return cause_in_words(error.__cause__)
    text = one_line(error)[:400]
    is_mixed = "as a scalar of type" in text
    return f"{text}, the type of the column's first rows: give all rows one type" if is_mixed else text


def _in_words(error: Exception) -> str:
    # torchtune says in a ValueError what it wants of a conversation; other errors say little without their type
    return one_line(error, with_type=not isinstance(error, ValueError))[:400]
