"""Reads ``keys.yaml``, the one table of a config's keys: what each takes, its default, and what it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, first: int) -> bool:
    return isinstance(value, int) and is_number(value) and value >= first


@dataclass(frozen=True)
class Takes:
    """The values of a key: in words that go on from "must be", and as a test."""

    words: str
    allows: Callable[[Any], bool] = lambda value: True

    @property
    def or_null(self) -> Takes:
        return Takes(f"{self.words} or null", lambda value: value is None or self.allows(value))


# By the names that the table uses.
TAKES = {
    "bool": Takes("True or False", lambda value: isinstance(value, (bool, type(None)))),
    "count": Takes("a whole number from 1 on", lambda value: _is_whole(value, 1)),
    "device": Takes(
        "cuda, cpu, xpu or npu", lambda value: re.fullmatch(r"(cpu|cuda|xpu|npu)(:\d*)?", str(value)) is not None
    ),
    "folder": Takes("the path of a folder", lambda value: isinstance(value, str) and value != ""),
    "norm": Takes(
        "a positive number, 'inf' to only log the norm, or null",
        lambda value: value in (None, "inf") or is_number(value) and value > 0,
    ),
    "rate": Takes("a number from 0 on, such as 2e-5", lambda value: value is None or is_number(value) and value >= 0),
    "section": Takes("a section"),  # which is checked as a whole
    "seed": Takes(
        f"a whole number from 0 to {2**32 - 1}, or null for a random one",
        lambda value: value is None or _is_whole(value, 0) and value < 2**32,
    ),
}
TAKES |= {f"{name} or null": takes.or_null for name, takes in TAKES.items()}


@dataclass(frozen=True)
class Key:
    """An entry of the table, whose first lines say what the fields are."""

    name: str
    comment: str
    takes: Takes
    gives: Mapping[str, Any] | None = None
    needed: bool = False
    default: Any = ""  # that of the section's component
    may_differ: bool = False
    shown: bool = False
    recipe: str = ""
    synonyms: Sequence[str] = ()


def _key(name: str, entry: str | dict[str, Any]) -> Key:
    if isinstance(entry, str):
        return Key(name, entry, Takes(""))
    takes = entry.pop("takes", None)
    if isinstance(takes, list):
        words = ["or null" if choice is None else str(choice) for choice in takes]
        return Key(name, takes=Takes(f"one of {', '.join(words)}", lambda value: value in takes), **entry)
    return Key(name, takes=Takes(entry.pop("words", "")) if takes is None else TAKES[takes], **entry)


_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

# By the parts of a config, in the order in which configs have them.
GROUPS = {title: [_key(name, entry) for name, entry in part.items()] for title, part in _TABLE.items()}

KEYS = {key.name: key for keys in GROUPS.values() for key in keys}

# Sections whose keys are those of another one.
_SAME_KEYS = {"dataset_val": "dataset", "ref_checkpointer": "checkpointer"}


def _without_index(name: str) -> str:
    return re.sub(r"\[\d+\]", "", name)


def listed_as(name: str) -> str:
    """The name of a key in the section that lists it: ``dataset.split`` for ``dataset_val[0].split``."""
    section, dot, inner = _without_index(name).partition(".")
    return f"{_SAME_KEYS.get(section, section)}.{inner}" if dot else section


def find(name: str) -> Key | None:
    """The entry of a key, such as ``dataset_val[0].split``; None if the table has none."""
    return KEYS.get(_without_index(name)) or KEYS.get(listed_as(name))


def may_differ(name: str) -> bool:
    """Whether a key, such as ``dataset[0].split``, may have another value in a run that goes on from a checkpoint."""
    parts = _without_index(name).split(".")
    entries = (KEYS.get(".".join(parts[:i])) for i in range(1, len(parts) + 1))
    return any(entry is not None and entry.may_differ for entry in entries)
