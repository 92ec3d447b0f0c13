"""Files of rows as ``datasets`` reads them: which line of which cannot be read, and why."""

import csv
import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from gmt_tune.errors import UserError

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def fault_of_files(files: object, kind: object) -> str | None:
    """What is wrong with the first local file that cannot be read as rows, with the line where that is known.

    ``files`` is a path or pattern, a list of such, or either by split, as ``datasets.load_dataset`` takes them. Those
    of another ``kind`` than "json", "csv" and "text" are not looked at.
    """
    if kind not in ("json", "csv", "text"):
        return None
    found = {pattern: sorted(glob.glob(pattern, recursive=True)) for pattern in _paths_in(files)}
    for pattern, paths in found.items():
        if glob.has_magic(pattern) and "://" not in pattern and not paths:
            return f"no file matches {pattern}"
    for path in (Path(path) for paths in found.values() for path in paths):
        if path.is_file() and path.suffix not in _COMPRESSED:
            try:
                _check_file(path, str(kind))
            except UserError as error:
                return str(error)
    return None


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a JSON Lines file and their lines' numbers, from 1 on. UserError names a line that holds no row."""
    lines = _text_lines(path)
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            is_last = next(lines, None) is None
            remedy = "the file is cut off there: copy it again, or delete the line" if is_last else "correct it"
            raise UserError(f"line {number} of {path} is no valid JSON ({error.msg}): {remedy}") from None
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is {shortened(row)}, not an object with the row's columns")
        yield number, row


def shortened(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _paths_in(files: object) -> list[str]:
    if isinstance(files, Mapping):
        files = list(files.values())
    if isinstance(files, (list, tuple)):
        return [path for part in files for path in _paths_in(part)]
    return [] if files is None else [str(files)]


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise UserError(f"line {number} of {path} is not UTF-8: convert the file") from None
            if text:
                yield number, text


def _check_file(path: Path, kind: str) -> None:
    first: list[str] = []
    for _, line in _text_lines(path):  # to the end: each must be UTF-8
        if len(first) < 2:
            first.append(line)
    if not first:
        raise UserError(f"{path} is empty")
    if kind == "csv" and len(first) == 1:
        raise UserError(f"{path} has a header and no rows")
    if kind == "csv":
        _check_csv(path)
    # A row a line, or one JSON text over all lines, whose second line does not begin an object that the first left
    elif kind == "json" and len(first) == 2 and (_is_json(first[0]) or all(line.startswith("{") for line in first)):
        for _ in json_lines(path):
            pass
    elif kind == "json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is no valid JSON ({error.msg} in line {error.lineno}): correct it, or copy the file again"
            ) from None


def _check_csv(path: Path) -> None:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        width = len(next(reader))
        for row in reader:
            if len(row) > width:
                raise UserError(
                    f"line {reader.line_num} of {path} has {len(row)} cells, but the header has {width}: put a cell "
                    "that holds a comma in quotes"
                )


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
