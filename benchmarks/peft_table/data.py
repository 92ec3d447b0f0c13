"""The comparison's data: MetaMathQA to train on, GSM8K to answer, Wikipedia to see what was forgotten.

Rows come from the hub, or from local files of the same columns: MetaMathQA and Wikipedia from ``metamathqa.jsonl``
(query, response) and ``finewiki.jsonl`` (text) of a folder, GSM8K from ``train.jsonl`` and ``test.jsonl`` (question,
answer) of the folder $GSM8K_DIR.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gmt_tune.errors import UserError

LONGEST_ROW = 1300  # characters of question and answer; longer rows are left out
VALIDATION_ROWS = 50  # of GSM8K's training set
BATCHES_IN_BUCKET = 20
WIKIPEDIA_ROWS = 100

_METAMATH, _GSM8K, _WIKIPEDIA = "meta-math/MetaMathQA", "openai/gsm8k", "HuggingFaceFW/finewiki"


class Data(NamedTuple):
    """Files that were written, and what training reads.

    Attributes:
        train: JSON Lines with ``text``, in the order of training.
        lengths: tokens of each row of it.
        validation, test: JSON Lines with ``question`` and ``answer``.
        wikipedia: JSON Lines with ``text``.
        versions: by the comparison's name of a data set, the hub's ``sha`` and ``created_at``; None for local files.
    """

    train: Path
    lengths: list[int]
    validation: Path
    test: Path
    wikipedia: Path
    versions: dict[str, dict]


def prompt(question: str) -> str:
    """What stands before an answer."""
    return f"Question: {question} Think step by step.\nAnswer:"


def check_local(local: Path | None) -> None:
    """Raise UserError if a local file is missing that ``prepare`` would read."""
    gsm8k = os.environ.get("GSM8K_DIR")
    needed = [("--data", local, name) for name in ("metamathqa.jsonl", "finewiki.jsonl")]
    needed += [("GSM8K_DIR", gsm8k and Path(gsm8k), name) for name in ("train.jsonl", "test.jsonl")]
    for source, folder, name in needed:
        if folder and not (folder / name).is_file():
            raise UserError(f"{folder / name} does not exist: {source} must name a folder with {name}")


def prepare(folder: Path, tokenizer, *, local: Path | None, steps: int, batch_size: int) -> Data:
    """Write all files.

    Args:
        folder: for the files.
        tokenizer: of torchtune; it says which rows are longest.
        local: folder with ``metamathqa.jsonl`` and ``finewiki.jsonl``; None for the hub.
        steps, batch_size: of the training, which sees no row twice.

    Raises:
        UserError: if there are fewer rows than training takes.
    """
    texts = _training_texts(local, steps * batch_size)
    lengths = [len(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in texts]
    order = _bucketed(lengths, BATCHES_IN_BUCKET * batch_size)
    validation, test = _gsm8k()
    return Data(
        train=_write(folder / "train.jsonl", [{"text": texts[i]} for i in order]),
        lengths=[lengths[i] for i in order],
        validation=_write(folder / "validation.jsonl", validation),
        test=_write(folder / "test.jsonl", test),
        wikipedia=_write(folder / "wikipedia.jsonl", _wikipedia(local)),
        versions={
            "metamath": _version(None if local else _METAMATH),
            "gsm8k": _version(None if "GSM8K_DIR" in os.environ else _GSM8K),
        },
    )


def _training_texts(local: Path | None, count: int) -> list[str]:
    from datasets import load_dataset

    rows = _local(local / "metamathqa.jsonl") if local else load_dataset(_METAMATH, split="train")
    short = (row for row in rows if len(row["query"]) + 1 + len(row["response"]) <= LONGEST_ROW)
    texts = [prompt(row["query"]) + row["response"] for row in islice(short, count)]
    if len(texts) < count:
        raise UserError(
            f"training takes {count} rows, but MetaMathQA has {len(texts)} that are short enough: lower "
            "max_steps_per_epoch or batch_size"
        )
    return texts


def _bucketed(lengths: list[int], size: int) -> list[int]:
    """Indices in which each run of ``size`` has its longest rows first: little padding, and all rows mixed."""
    buckets = [range(start, min(start + size, len(lengths))) for start in range(0, len(lengths), size)]
    return [i for bucket in buckets for i in sorted(bucket, key=lambda i: -lengths[i])]


def _gsm8k() -> tuple[list[dict], list[dict]]:
    """Rows for validation, drawn from the training set as the comparison draws them, and all of the test set."""
    import numpy as np
    from datasets import load_dataset

    local = os.environ.get("GSM8K_DIR")
    train, test = (
        list(_local(Path(local) / f"{split}.jsonl") if local else load_dataset(_GSM8K, "main", split=split))
        for split in ("train", "test")
    )
    drawn = np.arange(len(train))
    np.random.RandomState(0).shuffle(drawn)
    return [train[i] for i in drawn[:VALIDATION_ROWS]], test


def _wikipedia(local: Path | None) -> list[dict]:
    from datasets import load_dataset

    if local:
        rows: Iterable = _local(local / "finewiki.jsonl")
    else:
        rows = load_dataset(_WIKIPEDIA, split="train", streaming=True)  # the first rows, not whole shards
    return [{"text": row["text"]} for row in islice(rows, WIKIPEDIA_ROWS)]


def _local(file: Path):
    from datasets import load_dataset

    return load_dataset("json", data_files=str(file), split="train")


def _version(name: str | None) -> dict:
    if name is None:
        return {"sha": None, "created_at": None}
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(name)
    return {"sha": info.sha, "created_at": info.created_at.isoformat() if info.created_at else None}


def _write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
