"""Files of rows as ``datasets`` reads them: which line of which cannot be read, and why."""

import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

from gmt_tune.errors import UserError, one_line

KINDS = ("json", "csv", "text", "parquet")  # of files whose rows are checked, as ``datasets`` names them
_COMPRESSED = (".bz2", ".xz", ".zst", ".lz4", ".zip")
_CSV = {"delimiter": ",", "quotechar": '"'}
# Keys of ``datasets.load_dataset`` with which a CSV file has other lines or cells than ``csv.reader`` sees.
_CSV_CHANGES = (
    *("column_names", "comment", "dialect", "doublequote", "escapechar", "header", "lineterminator", "names", "nrows"),
    *("on_bad_lines", "quoting", "skip_blank_lines", "skipfooter", "skiprows"),
)
_CHARACTERS_AT_ONCE = 1 << 20


def local_files(files: object, folder: object = None) -> list[Path] | None:
    """The files that ``datasets.load_dataset`` will read, in its order; None if they are not all local and readable.

    ``files`` is a path or pattern, a list of such, or either by split, relative to ``folder``, or to the current one.
    UserError says which pattern no file matches, and which path is a folder.
    """
    paths: list[Path] = []
    for pattern in _paths_in(files):
        if "://" in pattern:
            return None
        path = os.path.join(str(folder or ""), pattern)
        if glob.has_magic(pattern):
            found = [match for match in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(match)]
            if not found:
                raise UserError(f"no file matches {pattern}")
            paths += map(Path, found)
        elif os.path.isdir(path):
            raise UserError(f"{path} is a folder: name the files in it, such as {os.path.join(pattern, '*.jsonl')}")
        else:
            paths.append(Path(path))
    is_readable = all(path.is_file() and path.suffix not in _COMPRESSED for path in paths)
    return paths if paths and is_readable else None


def fault_of_files(section: Mapping[str, Any]) -> str | None:
    """What is wrong with the first local file that cannot be read as rows, with the line where that is known.

    The files are those of a config's section; other kinds than ``KINDS`` are not looked at.
    """
    kind, cells = section.get("source"), csv_format(section)
    if kind not in KINDS or cells is None:
        return None
    files, folder = section.get("data_files"), section.get("data_dir")
    if files is None and folder is None:  # datasets has read whatever is in the current folder
        return f"data_files is missing: name the {kind} files"
    try:
        for path in local_files(files, folder) or ():
            for _ in rows_of(path, kind, cells):
                pass
    except UserError as error:
        return str(error)
    return None


def csv_format(section: Mapping[str, Any]) -> dict[str, str] | None:
    """The delimiter and quotechar of a section's CSV files; None if they are not what ``csv.reader`` can read.

    A section of another ``source`` has those of every CSV file.
    """
    if section.get("source") != "csv":
        return _CSV
    delimiter = section.get("delimiter") or section.get("sep", ",")
    delimiter = "\t" if delimiter == r"\t" else delimiter
    cells = {"delimiter": delimiter, "quotechar": section.get("quotechar", _CSV["quotechar"])}
    is_simple = all(isinstance(mark, str) and len(mark) == 1 for mark in cells.values())
    return cells if is_simple and all(section.get(key) is None for key in _CSV_CHANGES) else None


def rows_of(path: Path, kind: str, cells: Mapping[str, str] = _CSV) -> Iterator[tuple[int | None, Any]]:
    """Rows of a file of "json", "csv", "text" or "parquet" as ``datasets`` counts them, with their lines' numbers.

    Lines count from 1 on; None where a row has no line of its own. Rows of JSON are dicts, where a text of a list of
    texts is the column "text"; those of a CSV file, of the format ``cells``, are lists of texts; those of a text file
    texts. UserError names the line that cannot be read.
    """
    try:
        if kind == "parquet":
            yield from _parquet_rows(path)
        elif kind == "csv":
            yield from _csv_rows(path, cells)
        elif (first_character := _first_character(path)) == "":
            raise UserError(f"{path} is empty")
        elif kind == "text":
            yield from _text_lines(path)
        elif first_character == "[":
            yield from _rows_of_list(path)
        else:
            yield from _json_objects(path)
    except UnicodeDecodeError:
        raise UserError(_fault_of_encoding(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is cut off or no gzip file ({one_line(error)}): copy it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_objects(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of JSON Lines, or the one row that is an object over all lines."""
    first = [line for _, line in itertools.islice(_text_lines(path), 2)]
    if not _is_json(first[0]) and not all(line.startswith("{") for line in first):
        yield _row_of_one_json(path)
        return
    for number, line in _text_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of numbers and brackets that never end
            is_cut_off = not line.endswith("\n")
            remedy = "the file is cut off there: copy it again, or delete the line" if is_cut_off else "correct it"
            raise UserError(f"line {number} of {path} is no valid JSON ({_in_words(error)}): {remedy}") from None
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


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _open(path: Path, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline=newline)


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    with _open(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


def _fault_of_encoding(path: Path) -> str:
    """Which line is not UTF-8. The error of reading does not say: files are decoded in blocks."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number} of {path} is not UTF-8: convert the file"
    return f"{path} is not UTF-8: convert the file"


def _first_character(path: Path) -> str:
    """The first one that is not blank; "" if there is none."""
    with _open(path) as file:
        while (character := file.read(1)).isspace():
            pass
    return character


def _row_of_one_json(path: Path) -> tuple[int, dict]:
    with _open(path) as file:
        text = file.read()
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(_fault_of_json(path, getattr(error, "lineno", 1), error)) from None
    if type(row) is not dict:
        raise UserError(f"{path} is {shortened(row)}, not an object with the row's columns")
    return 1, row


def _rows_of_list(path: Path) -> Iterator[tuple[int, dict]]:
    kind = None
    with _open(path) as file:
        for number, (line, row) in enumerate(_values_of_list(path, file)):
            kind = kind or type(row)
            if type(row) is not kind or kind not in (dict, str):
                raise UserError(f"row {number} of {path} is {shortened(row)}, not an object with the row's columns")
            yield line, row if kind is dict else {"text": row}


def _values_of_list(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """Values of a JSON list and the lines in which they begin; the list itself is never in memory as a whole.

    Where the text does not go on as a list must, more of it is read first. At the file's end, that is an error. (A
    number may come in two parts, but numbers are no rows.)
    """
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    text, at, line, mark = "", 0, 1, "["
    while True:
        begin = blanks.match(text, at).end()  # type: ignore[union-attr]
        try:
            if mark == "," and text.startswith("]", begin):
                break
            if not text.startswith(mark, begin):
                raise json.JSONDecodeError(f"Expecting {mark!r}", text, begin)
            begin = blanks.match(text, begin + 1).end()  # type: ignore[union-attr]
            value, end = decode(text, begin)
        except (ValueError, RecursionError) as error:
            more = file.read(max(_CHARACTERS_AT_ONCE, len(text) - at))
            if more:
                text, at = text[at:] + more, 0
                continue
            if re.fullmatch(r"\s*\[\s*\]\s*", text):
                raise UserError(f"{path} is an empty list: there is nothing to read") from None
            line += text.count("\n", at, getattr(error, "pos", at))
            raise UserError(_fault_of_json(path, line, error)) from None
        line += text.count("\n", at, begin)
        yield line, value
        line += text.count("\n", begin, end)
        at, mark = end, ","
    if text[begin + 1 :].strip() or file.read(_CHARACTERS_AT_ONCE).strip():
        raise UserError(_fault_of_json(path, line + text.count("\n", at, begin), ValueError("Extra data")))


def _fault_of_json(path: Path, line: int, error: Exception) -> str:
    text = getattr(error, "msg", str(error)).removesuffix(" at")
    return f"{path} is no valid JSON ({text} in line {line}): correct it, or copy the file again"


def _csv_rows(path: Path, cells: Mapping[str, str]) -> Iterator[tuple[int, list[str]]]:
    try:
        with _open(path, newline="") as file:
            reader = csv.reader(file, delimiter=cells["delimiter"], quotechar=cells["quotechar"])
            header = next(filter(None, reader), None)
            if header is None:
                raise UserError(f"{path} is empty")
            is_first, begin = True, reader.line_num + 1
            for row in reader:
                if len(row) > len(header):
                    raise UserError(
                        f"line {begin} of {path} has {len(row)} cells, but the header has {len(header)}: put a cell "
                        f"that holds {cells['delimiter']!r} in quotes"
                    )
                if row:
                    is_first = False
                    yield begin, row
                begin = reader.line_num + 1
            if is_first:
                raise UserError(f"{path} has a header and no rows")
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is no valid CSV ({error}): correct it") from None


def _parquet_rows(path: Path) -> Iterator[tuple[None, dict]]:
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield None, row
    except (OSError, ArrowException) as error:
        raise UserError(f"{path} is cut off or no Parquet file ({one_line(error)[:200]}): copy it again") from None


def _in_words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
