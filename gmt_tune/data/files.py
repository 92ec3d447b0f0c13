"""Files of rows as ``datasets`` reads them: which line of which cannot be read, and why."""

import csv
import glob
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

from gmt_tune.errors import UserError, one_line

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def local_files(files: object, folder: str | None = None) -> list[Path] | None:
    """The files that ``datasets.load_dataset`` will read, in its order; None if they are not all plain files here.

    ``files`` is a path or pattern, or a list of such, relative to ``folder``, or to the current one. UserError says
    which pattern no file matches.
    """
    paths: list[Path] = []
    for pattern in _paths_in(files):
        if "://" in pattern:
            return None
        found = sorted(glob.glob(os.path.join(folder or "", pattern), recursive=True))
        if not found and glob.has_magic(pattern):
            raise UserError(f"no file matches {pattern}")
        paths += map(Path, found)
    is_plain = all(path.is_file() and path.suffix not in _COMPRESSED for path in paths)
    return paths if paths and is_plain else None


def fault_of_files(files: object, kind: object) -> str | None:
    """What is wrong with the first local file that cannot be read as rows, with the line where that is known.

    ``files`` is a path or pattern, a list of such, or either by split, as ``datasets.load_dataset`` takes them. Those
    of another ``kind`` than "json", "csv", "text" and "parquet" are not looked at.
    """
    if kind not in ("json", "csv", "text", "parquet"):
        return None
    try:
        for path in local_files(list(files.values()) if isinstance(files, Mapping) else files) or ():
            for _ in rows_of(path, str(kind)):
                pass
    except UserError as error:
        return str(error)
    return None


def rows_of(path: Path, kind: str) -> Iterator[tuple[int | None, Any]]:
    """Rows of a file of "json", "csv", "text" or "parquet" as ``datasets`` counts them, with their lines' numbers.

    Lines count from 1 on; None where a row has no line of its own. Rows of JSON are dicts, or texts where it is a list
    of such; those of a CSV file lists of texts, of a text file texts. UserError names the line that cannot be read.
    """
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    if kind == "csv":
        yield from _csv_rows(path)
        return
    first = [line for _, line in itertools.islice(_text_lines(path), 2)]
    if not first:
        raise UserError(f"{path} is empty")
    if kind == "text":
        yield from _text_lines(path)
    # A row a line, or one JSON text over all lines, whose second line does not begin an object that the first left
    elif len(first) == 2 and (_is_json(first[0]) or all(line.startswith("{") for line in first)):
        yield from json_lines(path)
    else:
        yield from _rows_of_one_json(path)


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a JSON Lines file and their lines' numbers, from 1 on. UserError names a line that holds no row."""
    lines = _text_lines(path)
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of numbers and brackets that never end
            is_last = next(lines, None) is None
            remedy = "the file is cut off there: copy it again, or delete the line" if is_last else "correct it"
            raise UserError(
                f"line {number} of {path} is no valid JSON ({getattr(error, 'msg', error)}): {remedy}"
            ) from None
        if type(row) is not dict:
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
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line
    except UnicodeDecodeError:
        raise UserError(_fault_of_encoding(path)) from None


def _fault_of_encoding(path: Path) -> str:
    """A file that is not UTF-8 is decoded in blocks: which line it is, is looked for."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number} of {path} is not UTF-8: convert the file"
    return f"{path} is not UTF-8: convert the file"


def _rows_of_one_json(path: Path) -> Iterator[tuple[int | None, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(_fault_of_encoding(path)) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is no valid JSON ({error.msg} in line {error.lineno}): correct it, or copy the file again"
        ) from None
    except RecursionError as error:
        raise UserError(f"{path} is no valid JSON ({error}): correct it, or copy the file again") from None
    rows = content if isinstance(content, list) else [content]
    if not rows:
        raise UserError(f"{path} is an empty list: there is nothing to read")
    for number, row in enumerate(rows):
        if type(row) is not type(rows[0]) or not isinstance(row, (dict, str)):
            raise UserError(f"row {number} of {path} is {shortened(row)}, not an object with the row's columns")
        yield (None if isinstance(content, list) else 1), row


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(filter(None, reader), None)
            if header is None:
                raise UserError(f"{path} is empty")
            is_first, begin = True, reader.line_num + 1
            for row in reader:
                if len(row) > len(header):
                    raise UserError(
                        f"line {begin} of {path} has {len(row)} cells, but the header has {len(header)}: put a cell "
                        "that holds a comma in quotes"
                    )
                if row:
                    is_first = False
                    yield begin, row
                begin = reader.line_num + 1
            if is_first:
                raise UserError(f"{path} has a header and no rows")
    except UnicodeDecodeError:
        raise UserError(_fault_of_encoding(path)) from None
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is no valid CSV ({error}): correct it") from None


def _parquet_rows(path: Path) -> Iterator[tuple[None, dict]]:
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield None, row
    except (OSError, ArrowException) as error:
        raise UserError(f"{path} is cut off or no Parquet file ({one_line(error)[:200]}): copy it again") from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
