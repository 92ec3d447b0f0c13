"""The tasks: questions with answers in three splits, and texts whose loss shows what a model forgot.

``train`` is trained on, ``validation`` is cut from the training set and chooses learning rates, ``test`` is the data
set's own held-out part and is asked once, of finished models.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gmt_tune.data import village
from gmt_tune.errors import UserError

SPLITS = ("train", "validation", "test")


class Row(NamedTuple):
    """A question and the answer that is expected."""

    prompt: str
    answer: str


class Task(NamedTuple):
    """Where rows and texts come from, and how an answer is compared.

    Attributes:
        rows: function of a folder for downloads; gives the rows of each split.
        texts: function that gives texts that have nothing to do with the task, by name.
        extract: regular expression whose group is compared, or None to compare whole answers.
        max_new_tokens: the longest answer that is generated.
    """

    rows: Callable[[Path], dict[str, list[Row]]]
    texts: Callable[[], dict[str, str]]
    extract: str | None
    max_new_tokens: int


def task(name: str) -> Task:
    """The task of a suite's ``task`` key."""
    if name not in _TASKS:
        raise UserError(f"task is {name!r}, but must be one of {', '.join(_TASKS)}")
    return _TASKS[name]


def write_split(file: Path, rows: list[Row], *, seed: int | None = None, size: int | None = None) -> None:
    """Write rows as JSON Lines with the keys prompt and answer.

    Args:
        file: is replaced in one go.
        rows: of one split.
        seed: of their order; None keeps the order.
        size: the first so many in that order; None for all.
    """
    rows = list(rows)
    if seed is not None:
        random.Random(seed).shuffle(rows)
    if size is not None and size > len(rows):
        raise UserError(f"{size} rows are asked for, but the split has {len(rows)}: lower the suite's number")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows[:size]), encoding="utf-8")
    part.replace(file)


def no_longer(rows: Iterable[Row], characters: int) -> list[Row]:
    """The rows whose question and answer together have so many characters at most."""
    return [row for row in rows if sum(map(len, row)) <= characters]


def digest(text: str) -> str:
    """What a text is recognised by in a result."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- the village: see gmt_tune.data.village


def _village_rows(folder: Path) -> dict[str, list[Row]]:
    names = list(village.people())
    asked = [Row(*question) for question in village.questions("train")]
    of_person = {name: [row for row in asked if name in row.prompt] for name in names}
    train_names = [name for name in names if of_person[name]]
    held_back = set(train_names[::6])  # a sixth of the people that training may ask about
    return {
        "train": [row for name in train_names if name not in held_back for row in of_person[name]],
        "validation": [row for name in train_names if name in held_back for row in of_person[name]],
        "test": [Row(*question) for question in village.questions("held_out")],
    }


def _village_texts() -> dict[str, str]:
    # All that this model has ever read; in words that the pretraining did not see in this order.
    return {"text": "\n".join(village.corpus(96, seed=10_001))}


# ---------------------------------------------------------------------- GSM8K


def _gsm8k_rows(folder: Path) -> dict[str, list[Row]]:
    """From the folder in $GSM8K_DIR with train.jsonl and test.jsonl, else from the hub's openai/gsm8k."""
    local = os.environ.get("GSM8K_DIR")
    if local:
        read = {split: _read_json_lines(Path(local) / f"{split}.jsonl") for split in ("train", "test")}
    else:
        from datasets import load_dataset

        read = {split: list(load_dataset("openai/gsm8k", "main", split=split)) for split in ("train", "test")}
    # <<48/2=24>> are marks for a calculator that the model does not have
    rows = {
        split: [Row(row["question"], re.sub(r"<<[^>]*>>", "", row["answer"])) for row in rows]
        for split, rows in read.items()
    }
    shuffled = list(rows["train"])
    random.Random(0).shuffle(shuffled)
    return {"train": shuffled[500:], "validation": shuffled[:500], "test": rows["test"]}


# ---------------------------------------------------------------------- sentiment of film reviews

_SENTIMENT_PACKAGE = "vaderSentiment==3.3.2"
_SENTIMENT_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_CLEAR = 0.5  # of mean ratings from -4 to 4: snippets between -0.5 and 0.5 are left out


def _sentiment_rows(folder: Path) -> dict[str, list[Row]]:
    """10,605 snippets of film reviews, each rated by 20 people (Hutto and Gilbert, ICWSM 2014).

    The source distribution of the PyPI package vaderSentiment (MIT) holds them.
    """
    with tarfile.open(_sentiment_archive(folder)) as outer:
        inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
            text = archive.extractfile(_SENTIMENT_FILE).read().decode("utf-8", errors="replace")
    rows = []
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) >= _CLEAR:
            question = f"Is this snippet of a film review positive or negative?\n\n{snippet.strip()}"
            rows.append(Row(question, "positive" if float(rating) > 0 else "negative"))
    random.Random(0).shuffle(rows)
    return {"test": rows[:1000], "validation": rows[1000:1500], "train": rows[1500:]}


def _sentiment_archive(folder: Path) -> Path:
    found = sorted(folder.glob("*ader*entiment-*.tar.gz"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "-d", str(folder), _SENTIMENT_PACKAGE], capture_output=True, text=True)
        found = sorted(folder.glob("*ader*entiment-*.tar.gz"))
        if not found:
            raise UserError(
                f"the source distribution of {_SENTIMENT_PACKAGE} cannot be downloaded "
                f"({done.stderr.strip()[-200:]}): put it into {folder}"
            )
    return found[-1]


# ---------------------------------------------------------------------- code: functions of a package

_CODE_PACKAGE = "sympy"
_CODE_VERSION = "1.14.0"  # the one that torch brings, by constraints.txt
_LONGEST_FUNCTION = 320  # characters of question and answer


def _function_rows(folder: Path) -> dict[str, list[Row]]:
    """Short functions of SymPy (BSD licence): from signature and docstring to the body.

    A file's functions are all in one split, so that none is asked about a neighbour of what was trained on.
    """
    try:
        version, found = importlib.metadata.version(_CODE_PACKAGE), importlib.util.find_spec(_CODE_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = found = None
    if found is None or version != _CODE_VERSION:
        raise UserError(
            f"the task functions is made of {_CODE_PACKAGE}=={_CODE_VERSION}, but there is {version or 'none'}: "
            f"pip install {_CODE_PACKAGE}=={_CODE_VERSION}"
        )
    package = Path(found.origin).parent
    rows: dict[Row, str] = {}
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package)
        if not {"tests", "benchmarks"} & set(place.parts):
            for row in no_longer(_functions(file.read_text(encoding="utf-8")), _LONGEST_FUNCTION):
                rows.setdefault(row, place.as_posix())
    files = sorted(set(rows.values()))
    random.Random(0).shuffle(files)
    share = len(files) // 10
    split_of = dict.fromkeys(files, "train") | dict.fromkeys(files[:share], "validation")
    split_of |= dict.fromkeys(files[share : 2 * share], "test")
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row, file in rows.items():
        splits[split_of[file]].append(row)
    for split in SPLITS:
        random.Random(0).shuffle(splits[split])
    return splits


def _functions(source: str) -> Iterator[Row]:
    """Head and body of each documented function, without its decorators and all but its docstring's first paragraph."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (text := ast.get_docstring(node)):
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
            body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            first = " ".join(text.split("\n\n")[0].split())
            yield Row(f'Write the body of this function.\n\n{head}\n    """{first}"""', body)


# ---------------------------------------------------------------------- texts that no task is about


def _general_texts() -> dict[str, str]:
    """English and code from Python's standard library, the same on every machine with this Python."""
    import argparse
    import heapq
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    code = "\n\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in (textwrap, heapq, argparse))
    return {"text": text, "code": code}


def _read_json_lines(file: Path) -> list[dict]:
    if not file.is_file():
        raise UserError(f"{file} does not exist: GSM8K_DIR must name a folder with train.jsonl and test.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


_TASKS = {
    "village": Task(_village_rows, _village_texts, None, 12),
    "gsm8k": Task(_gsm8k_rows, _general_texts, r"####\s*(-?[\d.,]+)", 256),
    "sentiment": Task(_sentiment_rows, _general_texts, None, 4),
    "functions": Task(_function_rows, _general_texts, None, 100),
}
