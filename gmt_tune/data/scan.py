"""The rows of local files, looked at before anything is loaded: which row of which file is wrong, in which line.

A data set of JSON is scanned as its file is, where an error of ``datasets`` would name neither the row nor what its
reader wants of it. CSV and Parquet have types that only loading gives them: their rows are looked at when loaded
(:mod:`gmt_tune.data.rows`), and what is here finds the line of a wrong one.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ReadInstruction  # type: ignore[import-untyped]
from torchtune import utils

from gmt_tune.data.columns import Columns, Fault, RowCheck, columns_of_section, roles_in
from gmt_tune.data.files import local_files, rows_of
from gmt_tune.errors import UserError

# So many rows of a data set are looked at before it is loaded, about ten seconds' worth.
ROWS_SCANNED = 1_000_000
# Among so many, a message looks for columns and roles that a wrong row may be compared with.
_ROWS_COMPARED = 10_000
# Keys of ``datasets.load_dataset`` with which a file's rows are not what they seem.
_CHANGES_ROWS = ("field", "encoding", "features", "filter_fn", "name", "streaming")

_log = utils.get_logger("INFO")


class Place(NamedTuple):
    """Where a row of a data set is in its files."""

    file: Path
    line: int | None  # from 1 on; None where a row has no line of its own


class RowFiles:
    """The local files of a config's section, as rows. ``kind`` is the section's ``source``, such as "json"."""

    def __init__(self, paths: Sequence[Path], kind: str, split: str) -> None:
        self._paths, self._kind = paths, kind
        self._instruction = ReadInstruction.from_spec(split) if "[" in split or "+" in split else None

    def __iter__(self) -> Iterator[tuple[int, Place, Any]]:
        """Rows of the split with their numbers in it, from 0 on. UserError names a line that cannot be read."""
        number = 0
        for begin, end in self._ranges:
            for file, line, row in itertools.islice(self._all(), begin, end):
                yield number, Place(file, line), row
                number += 1

    def place_of(self, row: int) -> Place | None:
        """Where a row of the split is; None if it cannot be found."""
        try:
            return next((place for number, place, _ in self if number == row), None)
        except (UserError, ValueError, AssertionError):  # of a file that datasets reads in another way, or of the split
            return None

    def _all(self) -> Iterator[tuple[Path, int | None, Any]]:
        for path in self._paths:
            for line, row in rows_of(path, self._kind):
                yield path, line, row

    @cached_property
    def _ranges(self) -> list[tuple[int, int | None]]:
        """The rows of the files that a split like "train[:95%]" takes: begin and end."""
        if self._instruction is None:
            return [(0, None)]
        rows = sum(1 for _ in self._all())
        names = {part.splitname for part in self._instruction._relative_instructions}
        parts = self._instruction.to_absolute(dict.fromkeys(names, rows))
        return [(part.from_ or 0, part.to) for part in parts]


def files_of_section(section: Mapping[str, Any]) -> RowFiles | None:
    """The files that a section's data set is read from; None if they are not all here, or not read as they are."""
    kind, split = section.get("source"), section.get("split") or "train"
    if kind not in ("json", "csv", "text", "parquet") or any(section.get(key) is not None for key in _CHANGES_ROWS):
        return None
    files = section.get("data_files")
    if isinstance(files, Mapping):
        if set(files) != {split}:
            return None  # several splits: their files are looked at if loading fails
        files = files[split]
    if not isinstance(split, str):
        return None
    try:
        paths = local_files(files, section.get("data_dir"))
        return RowFiles(paths, kind, split) if paths is not None else None
    except (UserError, ValueError, AssertionError):  # no file matches, or it is no split: loading will say so
        return None


def scan_section(section: Mapping[str, Any], key: str, check_messages: Any = None) -> bool:
    """Look at the rows of a section's JSON files, before they are loaded; whether that was done.

    Files of another kind, those that are not here, and data sets that torchtune does not make, are left alone.

    Args:
        section (Mapping): of the config, as plain values.
        key (str): its name, such as ``dataset``.
        check_messages: the tokenizer's own check of a conversation, if it has one.

    Raises:
        UserError: the first row that is wrong, with its file and line.
    """
    columns = columns_of_section(section, key)
    if columns is None or section.get("source") != "json":
        return False
    files = files_of_section(section)
    if files is None:
        return False
    check = RowCheck(columns, check_messages, refuses_equal=True)
    number, rows = -1, iter(files)
    while True:
        try:
            number, place, row = next(rows)
        except StopIteration:
            break
        except (UserError, ValueError, AssertionError):
            return False  # datasets reads some files that this does not; what neither reads, loading will say
        if number == ROWS_SCANNED:
            utils.log_rank_zero(
                _log, f"Checked the first {ROWS_SCANNED:,} rows of {key}; the others are checked as they are read."
            )
            break
        fault = check.fault_of(row if isinstance(row, dict) else {"text": row})
        if fault is not None:
            some = [row for _, _, row in itertools.islice(files, _ROWS_COMPARED)]
            if (absent := absent_column(columns, {name for row in some for name in row}, key)) is not None:
                raise UserError(f"{absent} (seen in row {number}, {place.file})")
            raise UserError(sentence(number, key, place, fault, some))
    if number < 0:
        raise UserError(f"{key} has no rows: check its split, {section.get('split')}, and its files")
    return True


def absent_column(columns: Columns, present: Sequence[str] | set[str], key: str) -> str | None:
    """What to say if a column that is read is in no row of the section ``key``."""
    missing = next((name for name in columns.all if name not in present), None)
    if missing is None:
        return None
    names = sorted(present) if isinstance(present, set) else present
    remedy = f"set {columns.set_by} to what there is ({', '.join(names)})"
    delimiter = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if delimiter is not None:
        remedy = f"the cells of this file are not separated by commas: set {key}.sep={delimiter!r}"
    return f"{key}: its rows have no column '{missing}': {remedy}"


def sentence(row: int, name: str, place: Place | None, fault: Fault, some_rows: Any = ()) -> str:
    """The message of a wrong row, with the roles of the rows around it where that is what is wrong."""
    where = "" if place is None else f" ({place.file}{'' if place.line is None else f', line {place.line}'})"
    roles = roles_in(some_rows, fault.conversation) if fault.conversation is not None else ""
    seen = f" (roles in these rows: {roles})" if roles else ""
    return f"row {row} of {name}{where}: {fault.text}{seen}: {fault.remedy} (rows are counted from 0)"
