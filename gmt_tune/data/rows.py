"""Rows of a data set that say which of them is wrong, and why: before training where that costs little.

torchtune prepares a row when its turn comes, which may be hours after the start, and its errors name no row. Some
faults raise no error at all: in a chat, torchtune takes a message whose content is null for a copy of the one before.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets  # type: ignore[import-untyped]
from torch.utils.data import Dataset
from torchtune.data import (
    AlpacaToMessages,
    ChosenRejectedToMessages,
    InputOutputToMessages,
    OpenAIToMessages,
    ShareGPTToMessages,
    validate_messages,
)
from torchtune.datasets import ConcatDataset, PackedDataset, PreferenceDataset, SFTDataset, TextCompletionDataset
from torchtune.datasets._stack_exchange_paired import StackExchangePairedToMessages

from gmt_tune.data.files import shortened
from gmt_tune.errors import UserError, UserErrorOfOneRank, one_line

# So many rows are looked at before training, about ten seconds' worth; further ones when their turn comes.
ROWS_CHECKED_AHEAD = 100_000
_REMEDY = "correct it or delete the row"


class _Columns(NamedTuple):
    """What a data set reads of each row."""

    texts: tuple[str, ...] = ()
    formatted: tuple[str, ...] = ()  # columns that are put in a template, which makes text of numbers
    conversations: tuple[str, ...] = ()  # columns with lists of messages
    role: str = "role"  # the key of a message's role
    content: str = "content"
    assistant: str = "assistant"  # the role of the model's own messages
    needs_answer: bool = False
    skips_system: bool = False  # the config's new_system_prompt stands for the messages of the system


# What torchtune's transforms read of a row, by the names that their column_map may replace.
_READ: dict[type, _Columns] = {
    InputOutputToMessages: _Columns(texts=("input", "output")),
    AlpacaToMessages: _Columns(texts=("output",), formatted=("instruction",)),
    StackExchangePairedToMessages: _Columns(texts=("prompt", "chosen", "rejected")),
    OpenAIToMessages: _Columns(conversations=("messages",)),
    ShareGPTToMessages: _Columns(conversations=("conversations",), role="from", content="value", assistant="gpt"),
    ChosenRejectedToMessages: _Columns(conversations=("chosen", "rejected")),
}


class CheckedRows(Dataset):
    """A data set as it is, whose errors name the row and what is wrong with it. Messages call the set ``name``."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self._dataset, self._name = dataset, name
        # As it was loaded, where torchtune's own code prepares one row of it at a time
        own = (SFTDataset, PreferenceDataset, TextCompletionDataset)
        is_torchtunes = any(type(dataset).__getitem__ is kind.__getitem__ for kind in own)
        raw: Any = getattr(dataset, "_data", None)
        self._raw: Any = raw if is_torchtunes and isinstance(raw, datasets.Dataset) else None
        self._transform: Any = getattr(dataset, "_message_transform", None)
        tokenizer = getattr(dataset, "_model_transform", None) or getattr(dataset, "_tokenizer", None)
        self._check_messages: Any = getattr(tokenizer, "check_messages", None)  # gmt-tune's tokenizers have it
        self._columns = _columns_of(dataset)
        code = [part for part in (dataset, self._transform) if part is not None]
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
            fault = self._fault_of(sample)
            if fault is None:
                return self._dataset._prepare_sample(sample)  # type: ignore[attr-defined]
        except (UserError, OSError):
            raise
        except Exception as error:
            remedy = _REMEDY if self._is_torchtunes else "the data set's own code failed on it"
            raise UserErrorOfOneRank(self._sentence(index, _in_words(error), remedy)) from error
        raise UserErrorOfOneRank(self._sentence(index, fault))

    def check(self, rows: int | None = ROWS_CHECKED_AHEAD) -> None:
        """Look at the first rows (None: all), without making tokens of them. UserError names one that is wrong."""
        if self._raw is None:
            return
        read = self._columns.texts + self._columns.formatted + self._columns.conversations
        if missing := [name for name in read if name not in self._raw.column_names]:
            raise UserError(
                f"{self._name}: its rows have no column '{missing[0]}': set column_map to those that there are "
                f"({', '.join(self._raw.column_names)})"
            )
        samples = iter(self._raw)  # in order, which is faster than one by one
        for index in range(len(self) if rows is None else min(rows, len(self))):
            try:
                sample = next(samples)
                fault = self._fault_of(sample) or self._fault_of_messages(sample)
            except Exception as error:
                raise UserError(self._sentence(index, _in_words(error))) from error
            if fault is not None:
                raise UserError(self._sentence(index, fault))

    def _sentence(self, index: int, fault: str, remedy: str = _REMEDY) -> str:
        return f"row {index} of {self._name}: {fault}: {remedy} (rows are counted from 0)"

    def _fault_of(self, sample: Mapping) -> str | None:
        """What is wrong with a row as it was loaded; None if it is fine."""
        for column in self._columns.texts:
            if not isinstance(sample[column], str):
                return f"{column} {_not_text(sample[column])}"
        for column in self._columns.formatted:
            if sample[column] is None:
                return f"{column} is null"
        for column in self._columns.conversations:
            fault = _fault_of_conversation(sample[column], column, self._columns)
            if fault is not None:
                return fault
        return None

    def _fault_of_messages(self, sample: Mapping) -> str | None:
        """What torchtune or the tokenizer says of its messages, without reading images or running others' code."""
        if type(self._transform) not in _READ or "image" in self._raw.column_names:
            return None
        conversations = self._transform(sample)
        if "messages" in conversations:
            validate_messages(conversations["messages"])
        for name, messages in conversations.items():
            for number, message in enumerate(messages):
                texts = [part["content"] for part in message.content if part["type"] == "text"]
                if not all(isinstance(text, str) for text in texts):
                    return f"a text of message {number} of {name} is null or no text"
            if self._check_messages is not None:
                self._check_messages(messages)
        return None


def rows_of_pack(packed: PackedDataset, index: int) -> range:
    """The rows that are in a pack, wholly or in part."""
    # Positions count from 0 in each row, and go on behind the last one, in the padding
    begin = [int((pack["input_pos"] == 0).sum()) for pack in packed.packs[: index + 1]]
    goes_on = bool(packed.packs[index]["input_pos"][0] != 0)
    return range(sum(begin[:-1]) - goes_on, sum(begin))


def positions_in_words(dataset: Dataset, positions: Sequence[int]) -> str:
    """How messages call positions in a data set: rows, or for packed ones, packs and the rows in them."""
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
    """Why a data set could not be loaded: ``datasets`` often says that there was an error, and which in its cause."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return cause_in_words(error.__cause__)
    return one_line(error)[:400]


def _columns_of(dataset: Dataset) -> _Columns:
    if isinstance(dataset, TextCompletionDataset):
        return _Columns(texts=(dataset._column,))
    transform = getattr(dataset, "_message_transform", None)
    read = _READ.get(type(transform), _Columns())
    mapped = getattr(transform, "column_map", None) or getattr(transform, "_column_map", None) or {}
    texts, formatted, conversations = (tuple(mapped.get(name, name) for name in names) for names in read[:3])
    return read._replace(
        texts=texts,
        formatted=formatted,
        conversations=conversations,
        # A conversation without an answer has something to learn only where the prompt is learnt; a pair never has
        needs_answer=isinstance(transform, ChosenRejectedToMessages) or not getattr(transform, "train_on_input", True),
        skips_system=getattr(transform, "new_system_prompt", None) is not None,
    )


def _fault_of_conversation(messages: object, column: str, columns: _Columns) -> str | None:
    if messages is None:
        return f"{column} is null"
    if not isinstance(messages, (list, tuple)):
        return f"{column} is {shortened(messages)}, not a list of messages"
    if not messages:
        return f"{column} is an empty list"
    for number, message in enumerate(messages):
        where = f"message {number} of {column}"
        if not isinstance(message, Mapping):
            return f"{where} is {shortened(message)}, not an object with {columns.role} and {columns.content}"
        if not isinstance(message.get(columns.role), str):
            return f"{columns.role} of {where} {_not_text(message.get(columns.role))}"
        if columns.skips_system and message[columns.role] == "system":
            continue
        content = message.get(columns.content)
        if not isinstance(content, (str, list)):  # a list holds parts of text and images
            return f"{columns.content} of {where} {_not_text(content)}"
        if columns.assistant == "gpt" and message["from"] not in ("system", "human", "gpt"):
            return f"from of {where} is {message['from']!r}, not system, human or gpt"
    if columns.needs_answer and not any(message[columns.role] == columns.assistant for message in messages):
        return f"{column} has no message of the {columns.assistant}, so there is no answer to learn"
    return None


def _not_text(value: object) -> str:
    if value is None:
        return "is null"
    remedy = " (write it in quotes, in a file of JSON Lines)" if isinstance(value, (int, float)) else ""
    return f"is {shortened(value)}, not text{remedy}"


def _in_words(error: Exception) -> str:
    # torchtune says in a ValueError what it wants of a conversation; other errors say little without their type
    return one_line(error, with_type=not isinstance(error, ValueError))[:400]
