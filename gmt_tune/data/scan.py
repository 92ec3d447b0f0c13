"""The rows of local files, looked at before anything is loaded: which row of which file is wrong, in which line.

JSON is scanned before ``datasets`` reads it, since errors of ``datasets`` name no row. The types of CSV and Parquet are
known only when they are loaded: their rows are checked then (:mod:`gmt_tune.data.rows`), and this module finds the line
of a wrong one.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets import ReadInstruction  # type: ignore[import-untyped]
from torchtune import utils

from gmt_tune.data.columns import Columns, Fault, RowCheck, columns_of_section, roles_in
from gmt_tune.data.files import KINDS, csv_format, local_files, rows_of
from gmt_tune.errors import UserError

# The first rows of a data set, which are checked before it is loaded: about ten seconds' worth.
ROWS_SCANNED = 1_000_000
# The first rows, in which a message about a wrong row looks for the columns and roles that there are.
_ROWS_COMPARED = 10_000
# After a wrong row, others are counted until there are so many.
_WRONG_ROWS_COUNTED = 1_000
# Keys of ``datasets.load_dataset`` with which a data set has other rows than its files.
_CHANGES_ROWS = ("field", "encoding", "features", "filter_fn", "name", "streaming")

_log = utils.get_logger("INFO")
T = TypeVar("T")


class Place(NamedTuple):
    """Where a row of a data set is in its files."""

    file: Path
    line: int | None  # from 1 on; None where a row has no line of its own


class RowFiles:
    """The local files of a config's section, as rows.

    ``kind`` is the section's ``source``, such as "json"; ``cells`` the format of CSV files.
    """

    def __init__(self, paths: Sequence[Path], kind: str, split: str, cells: Mapping[str, str]) -> None:
        self._paths, self._kind, self._cells = paths, kind, cells
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
        except (UserError, ValueError, AssertionError):  # the file is not as datasets reads it, or the split is wrong
            return None

    def _all(self) -> Iterator[tuple[Path, int | None, Any]]:
        for path in self._paths:
            for line, row in rows_of(path, self._kind, self._cells):
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
    """The files of a section's data set; None if they are not all local, or the data set has other rows than they."""
    kind, split, cells = section.get("source"), section.get("split") or "train", csv_format(section)
    if kind not in KINDS or cells is None:
        return None
    if any(section.get(key) is not None for key in _CHANGES_ROWS):
        return None
    files = section.get("data_files")
    if isinstance(files, Mapping):
        if set(files) != {split}:
            return None  # several splits: their files are checked if loading fails
        files = files[split]
    if not isinstance(split, str):
        return None
    try:
        paths = local_files(files, section.get("data_dir"))
        return RowFiles(paths, kind, split, cells) if paths is not None else None
    except (UserError, ValueError, AssertionError):  # no file matches, or the split is wrong: loading reports it
        return None


def scan_section(section: Mapping[str, Any], key: str, check_messages: Any = None) -> bool:
    """Check the rows of a section's JSON files before they are loaded; return whether that was done.

    Files of another kind, files that are not local, and data sets that torchtune does not make, are not checked.

    Args:
        section (Mapping): of the config, as plain values.
        key (str): its name, such as ``dataset``.
        check_messages: the tokenizer's own check of a conversation, if it has one.

    Raises:
        UserError: the first row that is wrong, with its file and line, and how many others are.
    """
    columns = columns_of_section(section, key)
    if columns is None or section.get("source") != "json":
        return False
    files = files_of_section(section)
    if files is None:
        return False
    check = RowCheck(columns, check_messages, compares_pairs=True)
    number, found, rows = -1, None, iter(files)
    try:
        for number, place, row in rows:
            if number == ROWS_SCANNED:
                utils.log_rank_zero(
                    _log, f"Checked the first {ROWS_SCANNED:,} rows of {key}; the others are checked as they are read."
                )
                break
            fault = check.fault_of(row)
            if fault is not None:
                found = place, fault
                break
    except (UserError, ValueError, AssertionError):
        return False  # datasets reads some files that rows_of does not; if it fails too, that is reported then
    if number < 0:
        raise UserError(f"{key} has no rows: check its split, {section.get('split')}, and its files")
    if found is not None:
        place, fault = found
        first_rows = [row for _, _, row in _readable(itertools.islice(files, _ROWS_COMPARED))]
        if (absent := absent_column(columns, {name for row in first_rows for name in row}, key)) is not None:
            raise UserError(f"{absent} (seen in row {number}, {place.file})")
        others = _readable(itertools.islice(rows, ROWS_SCANNED - number - 1))
        wrong = count_wrong(check, ((other, row) for other, _, row in others))
        raise UserError(sentence(number, key, place, fault, first_rows, wrong))
    return True


def _readable(rows: Iterator[T]) -> Iterator[T]:
    """The rows before one that cannot be read."""
    try:
        yield from rows
    except UserError:
        return


class WrongRows(NamedTuple):
    """The numbers of rows after the first wrong one that are wrong too, and how many rows were checked in all."""

    numbers: list[int]
    checked: int


def count_wrong(check: RowCheck, rows: Iterable[tuple[int, Mapping]]) -> WrongRows:
    """Check the rows after a wrong one, given with their numbers; stop when very many are wrong."""
    wrong: list[int] = []
    number = -1
    for number, row in rows:
        if check.fault_of(row) is not None:
            wrong.append(number)
            if len(wrong) == _WRONG_ROWS_COUNTED:
                break
    return WrongRows(wrong, number + 1)


def absent_column(columns: Columns, present: Sequence[str] | set[str], key: str) -> str | None:
    """What to say if a column that is read is in no row of the section ``key``."""
    missing = next((name for name in columns.all if name not in present), None)
    if missing is None:
        return None
    names = sorted(present) if isinstance(present, set) else present
    shown = ", ".join(name if name == name.strip() else repr(name) for name in names)
    remedy = f"set {columns.set_by} to what there is ({shown})"
    delimiter = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if names[:1] and names[0].startswith(("{", "[{")):
        remedy = f"this file is JSON, not CSV: set {key}.source=json"
    elif delimiter is not None:
        remedy = f"the cells of this file are not separated by commas: set {key}.sep={delimiter!r}"
    return f"{key}: its rows have no column '{missing}': {remedy}"


def sentence(
    number: int,
    name: str,
    place: Place | None,
    fault: Fault,
    first_rows: Iterable[Mapping],
    others: WrongRows | None = None,
) -> str:
    """The message of a wrong row: with the roles in the first rows where a role is wrong, and the other wrong rows."""
    where = "" if place is None else f" ({place.file}{'' if place.line is None else f', line {place.line}'})"
    roles = roles_in(first_rows, fault.conversation) if fault.conversation is not None else ""
    seen = f" (roles in these rows: {roles})" if roles else ""
    more = ""
    if others is not None and others.numbers:
        count, numbers = len(others.numbers), ", ".join(map(str, others.numbers[:5]))
        more = f"; {count:,} more of the first {others.checked:,} rows {'is' if count == 1 else 'are'} wrong: {numbers}"
        more += ", ..." if count > 5 else ""
    return f"row {number} of {name}{where}: {fault.text}{seen}: {fault.remedy}{more} (rows are counted from 0)"
