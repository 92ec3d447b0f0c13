"""What torchtune's data sets read of a row, and what can be wrong with it: of a file's row as of a loaded one."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from difflib import get_close_matches
from typing import Any, NamedTuple

from torchtune import datasets
from torchtune.data import (
    AlpacaToMessages,
    ChosenRejectedToMessages,
    InputOutputToMessages,
    Message,
    OpenAIToMessages,
    ShareGPTToMessages,
    validate_messages,
)
from torchtune.datasets._stack_exchange_paired import StackExchangePairedToMessages

from gmt_tune.data.files import shortened
from gmt_tune.errors import UserError

REMEDY = "correct it or delete the row"

# By the keys of a message: its ``conversation_style``, and the roles it has, with torchtune's names for them.
_OPENAI, _SHAREGPT = ("role", "content"), ("from", "value")
_STYLES = {_OPENAI: "openai", _SHAREGPT: "sharegpt"}
_ROLES = {
    _OPENAI: {role: role for role in ("system", "user", "assistant", "tool", "ipython")},
    _SHAREGPT: {"system": "system", "human": "user", "gpt": "assistant"},
}
# Other names of these roles
_SYNONYMS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "question"),
    "assistant": ("assistant", "gpt", "bot", "model", "ai", "chatbot", "chatgpt", "bing", "answer"),
}


class Columns(NamedTuple):
    """What a data set reads of each row."""

    texts: tuple[str, ...] = ()
    formatted: tuple[str, ...] = ()  # columns that go into a template, which turns numbers into text
    conversations: tuple[str, ...] = ()  # columns with lists of messages
    set_by: str = "column_map"  # the key of the config that names the columns
    keys: tuple[str, str] = _OPENAI  # of a message: its role and its content
    has_style: bool = False  # whether the config's conversation_style chooses these keys
    needs_answer: bool = False
    skips_system: bool = False  # the config's new_system_prompt replaces all system messages
    alternates: bool = False  # torchtune's validate_messages checks the order of the messages

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all columns that are read."""
        return self.texts + self.formatted + self.conversations


class Fault(NamedTuple):
    """What is wrong with a row, what to do about it, and the conversation whose roles are what is wrong."""

    text: str
    remedy: str = REMEDY
    conversation: str | None = None


# What torchtune's transforms read of a row, by the names that their column_map may replace.
_READ: dict[type, Columns] = {
    InputOutputToMessages: Columns(texts=("input", "output"), alternates=True),
    AlpacaToMessages: Columns(texts=("output",), formatted=("instruction",), alternates=True),
    StackExchangePairedToMessages: Columns(texts=("prompt", "chosen", "rejected")),
    OpenAIToMessages: Columns(conversations=("messages",), alternates=True),
    ShareGPTToMessages: Columns(conversations=("conversations",), keys=_SHAREGPT, alternates=True),
    ChosenRejectedToMessages: Columns(conversations=("chosen", "rejected")),
}


def columns_of(dataset: object) -> Columns:
    """What a data set of torchtune's reads of a row, and nothing of another."""
    if isinstance(dataset, datasets.TextCompletionDataset):
        return Columns(texts=(dataset._column,), set_by="column")
    return _columns_of_transform(getattr(dataset, "_message_transform", None))


@dataclass(frozen=True)
class _Builder:
    """How a function of torchtune's turns a config's section into what it reads: by the class of its transform."""

    transform: type
    column_map: Mapping[str, str] | None = None  # its own default


_BUILDERS: dict[str, _Builder] = {
    "instruct_dataset": _Builder(InputOutputToMessages),
    "grammar_dataset": _Builder(InputOutputToMessages),
    "samsum_dataset": _Builder(InputOutputToMessages, {"input": "dialogue", "output": "summary"}),
    "alpaca_dataset": _Builder(AlpacaToMessages),
    "alpaca_cleaned_dataset": _Builder(AlpacaToMessages),
    "slimorca_dataset": _Builder(ShareGPTToMessages),
    "preference_dataset": _Builder(ChosenRejectedToMessages),
    "hh_rlhf_helpful_dataset": _Builder(ChosenRejectedToMessages),
}
_CHATS = {"openai": (OpenAIToMessages, "messages"), "sharegpt": (ShareGPTToMessages, "conversations")}


def columns_of_section(section: Mapping[str, Any], key: str) -> Columns | None:
    """What the data set of a config's section will read of a row; None if that is not known before it is made.

    ``key`` is the section's name. Raises UserError if ``conversation_style`` is none of torchtune's, or a column's name
    is no text.
    """
    name = _builder_name(section)
    if name is None:
        return None
    component = getattr(datasets, name)
    defaults = {p.name: p.default for p in inspect.signature(component).parameters.values()}
    values = {**defaults, **section}
    for name_of in ("column", "conversation_column"):
        if not isinstance(values.get(name_of, ""), str):
            raise UserError(f"{key}.{name_of} must be the name of a column, got {values[name_of]!r}")
    column_map = values.get("column_map")
    if column_map is not None and not (
        isinstance(column_map, Mapping) and all(isinstance(v, str) for v in column_map.values())
    ):
        raise UserError(f"{key}.column_map must map names to names of columns, got {column_map!r}")
    if name == "text_completion_dataset":
        return Columns(texts=(values["column"],), set_by="column")
    given = {k: values[k] for k in ("train_on_input", "new_system_prompt") if k in defaults}
    try:
        if name == "chat_dataset":
            style = values["conversation_style"]
            if style not in _CHATS:
                raise UserError(f"{key}.conversation_style must be openai or sharegpt, got {style!r}")
            transform, column = _CHATS[style]
            made = transform(column_map={column: values["conversation_column"]}, **given)
            return _columns_of_transform(made)._replace(set_by="conversation_column", has_style=True)
        builder = _BUILDERS[name]
        return _columns_of_transform(builder.transform(column_map=values["column_map"] or builder.column_map, **given))
    except (ValueError, TypeError):  # of a column_map, which the data set will say
        return None


def _builder_name(section: Mapping[str, Any]) -> str | None:
    """The function of torchtune's that a section calls, by whichever path; None if it is none that we know."""
    path, _, name = str(section.get("_component_")).rpartition(".")
    known = name in _BUILDERS or name in ("chat_dataset", "text_completion_dataset")
    return name if known and path.startswith("torchtune.datasets") else None


def _columns_of_transform(transform: object) -> Columns:
    read = _READ.get(type(transform), Columns())
    mapped = getattr(transform, "column_map", None) or getattr(transform, "_column_map", None) or {}
    texts, formatted, conversations = (tuple(mapped.get(name, name) for name in names) for names in read[:3])
    is_chat = isinstance(transform, (OpenAIToMessages, ShareGPTToMessages))
    return read._replace(
        texts=texts,
        formatted=formatted,
        conversations=conversations,
        set_by="conversation_column" if is_chat else read.set_by,
        has_style=is_chat,
        # A conversation without an answer has something to learn only where the prompt is learnt; a pair never has
        needs_answer=isinstance(transform, ChosenRejectedToMessages) or not getattr(transform, "train_on_input", True),
        skips_system=getattr(transform, "new_system_prompt", None) is not None,
    )


class RowCheck:
    """Says what is wrong with a row, in about a microsecond for a chat in which nothing is.

    Args:
        columns (Columns): what is read of a row.
        check_messages (Callable | None): the tokenizer's own check of a conversation, which raises ValueError and looks
            at roles alone; default None, no check.
        compares_pairs (bool): whether two answers of a pair must be to one question, and differ; default False.
    """

    def __init__(
        self,
        columns: Columns,
        check_messages: Callable[[Sequence[Message]], None] | None = None,
        *,
        compares_pairs: bool = False,
    ) -> None:
        self.columns, self._check_messages, self._compares_pairs = columns, check_messages, compares_pairs
        self._fine: set[tuple[str, ...]] = set()  # sequences of roles

    def fault_of(self, row: Mapping) -> Fault | None:
        """What is wrong with a row as it was read; None if it is fine."""
        columns = self.columns
        for column in columns.texts:
            if type(row.get(column)) is not str:
                return _fault_of_text(row, column)
        for column in columns.formatted:
            if row.get(column) is None:
                return _fault_of_text(row, column)
        for column in columns.conversations:
            if not self._is_fine(row.get(column)):
                fault = _missing(row, column) or self._fault_of_conversation(row[column], column)
                if fault is not None:
                    return fault
        if columns.conversations:
            if self._compares_pairs and len(columns.conversations) == 2:
                return _fault_of_pair(row, *columns.conversations)
        elif columns.alternates and () not in self._fine:  # a question and its answer in every row
            if (text := self._fault_of_order(["user", "assistant"])) is not None:
                return Fault(text)
            self._fine.add(())
        return None

    def _is_fine(self, messages: Any) -> bool:
        """Whether these are texts of roles that were fine before, in this order."""
        role, content = self.columns.keys
        roles = []
        try:
            for message in messages:
                roles.append(message[role])
                if type(message[content]) is not str:
                    return False
            return tuple(roles) in self._fine
        except (KeyError, TypeError, IndexError):
            return False

    def _fault_of_conversation(self, messages: object, column: str) -> Fault | None:
        if messages is None:
            return Fault(f"{column} is null")
        if not isinstance(messages, (list, tuple)):
            hint = " (it is in quotes: write the list itself)" if str(messages).lstrip().startswith("[") else ""
            if isinstance(messages, Mapping):
                hint = f" (or the row has {column} twice, or half of a character, such as \\ud83d)"
            return Fault(f"{column} is {shortened(messages)}, not a list of messages{hint}")
        if not messages:
            return Fault(f"{column} is an empty list")
        roles: list[str] = []
        for number, message in enumerate(messages):
            fault = self._fault_of_message(message, f"message {number} of {column}", column)
            if fault is not None:
                return fault
            roles.append(message[self.columns.keys[0]])
        names = _ROLES[self.columns.keys]
        if self.columns.needs_answer and not any(names[role] == "assistant" for role in roles):
            answer = next(role for role, name in names.items() if name == "assistant")
            return Fault(f"{column} has no {answer} message, so there is no answer to learn", REMEDY, column)
        fault_of_order = self._fault_of_order([names[role] for role in roles])
        if fault_of_order is not None:
            return Fault(fault_of_order, conversation=column)
        if len(self._fine) < 10_000:
            self._fine.add(tuple(roles))
        return None

    def _fault_of_message(self, message: object, where: str, column: str) -> Fault | None:
        columns = self.columns
        role, content = columns.keys
        if not isinstance(message, Mapping):
            return Fault(f"{where} is {shortened(message)}, not an object with {role} and {content}")
        if message.get(role) is None:
            other = _SHAREGPT if columns.keys == _OPENAI else _OPENAI
            if message.get(other[0]) is None:
                problem = "is null" if role in message else f"is missing (it has {', '.join(map(str, message))})"
                return Fault(f"{role} of {where} {problem}")
            remedy = f"set conversation_style: {_STYLES[other]}" if columns.has_style else "rename them in the file"
            return Fault(f"{where} has {' and '.join(other)}, not {role} and {content}", remedy, column)
        if not isinstance(message[role], str):
            return _fault_of_type(f"{role} of {where}", message[role])
        names = _ROLES[columns.keys]
        if message[role] not in names:
            known = ", ".join(name for name in names if name != "ipython")
            return Fault(
                f"{role} of {where} is {message[role]!r}, none of {known}", _remedy_for(message[role], names), column
            )
        if columns.skips_system and names[message[role]] == "system":
            return None
        if content not in message:
            return Fault(f"{content} of {where} is missing (it has {', '.join(map(str, message))})")
        text = message[content]
        if isinstance(text, (list, tuple)) and columns.keys == _OPENAI:  # parts of text and images
            texts = [part.get("text") for part in text if isinstance(part, Mapping) and part.get("type") == "text"]
            if not all(isinstance(part, str) for part in texts):
                return Fault(f"a text part of {where} is null or not text")
        elif not isinstance(text, str):
            calls = text is None and message.get("tool_calls")
            hint = " (tool_calls are not read: write the call into its content)" if calls else ""
            return _fault_of_type(f"{content} of {where}", text, hint)
        return None

    def _fault_of_order(self, roles: Sequence[str]) -> str | None:
        """What torchtune or the tokenizer says of a conversation with these roles, in this order."""
        if self.columns.skips_system:
            roles = ["system", *(role for role in roles if role != "system")]
        messages = [Message(role=role, content="") for role in roles]
        try:
            if self.columns.alternates:
                validate_messages(messages)
            if self._check_messages is not None:
                self._check_messages(messages)
        except ValueError as error:
            if "tool" in roles or "ipython" in roles:
                return f"{error} (torchtune accepts no answer after a tool message: make that a user message)"
            return str(error)
        return None


def roles_in(rows: Iterable[Mapping], column: str) -> str:
    """The roles that there are in a column of conversations, for a message: "from: gpt, human", or nothing."""
    found: dict[str, set[str]] = {}
    for row in rows:
        messages = row.get(column)
        for message in messages if isinstance(messages, (list, tuple)) else ():
            for key in ("role", "from") if isinstance(message, Mapping) else ():
                if isinstance(message.get(key), str):
                    found.setdefault(key, set()).add(message[key])
    return "; ".join(
        f"{key}: {', '.join(sorted(roles)[:10])}{', ...' if len(roles) > 10 else ''}" for key, roles in found.items()
    )


def _fault_of_pair(row: Mapping, chosen: str, rejected: str) -> Fault | None:
    """What is wrong with two conversations, each of which is fine."""
    if row[chosen] == row[rejected]:
        return Fault(
            f"{chosen} and {rejected} are the same, so there is nothing to prefer",
            f"delete such rows, as jq -c 'select(.{chosen} != .{rejected})' OLD.jsonl > NEW.jsonl does",
        )
    question, other = (_question(row[column]) for column in (chosen, rejected))
    if not question:
        return Fault(f"{chosen} begins with its answer: both conversations begin with the question")
    if question != other:
        return Fault(f"{chosen} and {rejected} begin with different questions: they are two answers to one")
    return None


def _question(messages: Sequence[Mapping]) -> list[Mapping]:
    """The messages before the first answer."""
    return list(itertools.takewhile(lambda message: message["role"] != "assistant", messages))


def _missing(row: Mapping, column: str) -> Fault | None:
    return (
        None if column in row else Fault(f"{column} is missing (the row has {', '.join(map(str, row)) or 'nothing'})")
    )


def _fault_of_text(row: Mapping, column: str) -> Fault:
    return _missing(row, column) or _fault_of_type(column, row[column])


def _remedy_for(role: str, names: Mapping[str, str]) -> str:
    """What a role that is not known may be meant to be."""
    meant = next((name for name, others in _SYNONYMS.items() if role.lower() in others), None)
    here = [known for known, name in names.items() if name == meant] or get_close_matches(role, names, n=1)
    return f"write {here[0]}" if here else "give it one of these roles"


def _fault_of_type(subject: str, value: object, hint: str = "") -> Fault:
    """The fault of a value that should be text."""
    if value is None:
        return Fault(f"{subject} is null{hint}")
    if isinstance(value, (date, time)):
        return Fault(
            f"{subject} is a date ({value}), not text",
            "write the column as text into a CSV or Parquet file; in JSON, texts that all look like dates are read as "
            "dates",
        )
    if isinstance(value, (int, float)):
        hint += " (write it in quotes, in a file of JSON Lines)"
    return Fault(f"{subject} is {shortened(value)}, not text{hint}")
