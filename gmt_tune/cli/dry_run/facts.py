"""What a run on the real model will read, do and save, as far as that can be known without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.optim.lr_scheduler import LambdaLR
from torchtune import config
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.run import data
from gmt_tune.integrations.torchtune.run.preference import check_preference_row
from gmt_tune.memory import Estimate

# So many rows of a data set are made into tokens, or as many as can be in this time.
ROWS = 2000
SECONDS = 15.0


@dataclass(frozen=True)
class Rows:
    """A data set, and what was seen of it.

    Attributes:
        rows: in all.
        seen: that were made into tokens, spread over the data set.
        median, longest: tokens of one of those, uncut; of pairs, of each answer with its prompt.
        cut: share of those that are longer than ``tokenizer.max_seq_len``.
        in_loss: share of their tokens, as they are trained on, that are in the loss.
        without_loss: share of those that have no token in the loss.
        largest_id: of all tokens seen.
        packs: about how many there will be, of packed data.
    """

    rows: int
    seen: int
    median: int
    longest: int
    cut: float
    in_loss: float
    without_loss: float
    largest_id: int
    packs: int | None = None


def parts_of(cfg: DictConfig, key: str) -> Iterator[DictConfig]:
    """The sections of a data set: one, or those of a list."""
    section = cfg.get(key, None)
    yield from section if isinstance(section, ListConfig) else [section]


def look_at_rows(cfg: DictConfig, key: str, *, pairs: bool) -> Rows:
    """Load a data set of a config as its recipe does, and make tokens of a part of its rows.

    Args:
        key: ``dataset`` or ``dataset_val``.
        pairs: whether rows are pairs of answers.

    Raises:
        UserError: as ``tune run`` does, for what is wrong with the data, tokenizer or a row.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    max_seq_len = cfg.tokenizer.get("max_seq_len", None)
    tokenizer = data.build_tokenizer(cfg.tokenizer)
    is_packed = any(part.get("packed", False) for part in parts_of(cfg, key))
    if is_packed and max_seq_len is None:
        raise UserError(f"{key}.packed: True needs tokenizer.max_seq_len, the length of a pack: set it to a number")
    for part in parts_of(cfg, key):
        if part.get("packed", False):
            part.packed = False  # packing makes tokens of all rows
    dataset, _ = data.build_dataset(cfg[key], tokenizer, key)
    if pairs:
        check_preference_row(dataset[0], key)
    n = len(dataset)
    step, deadline = max(1, n // ROWS), time.monotonic() + SECONDS
    lengths, in_loss, kept, without, largest, seen = [], 0, 0, 0, 0, 0
    for index in range(0, n, step):
        if seen and time.monotonic() > deadline or seen == ROWS:
            break
        tokenizer.max_seq_len = None
        answers = _answers(dataset[index], pairs)
        tokenizer.max_seq_len = max_seq_len
        if not answers:
            raise UserError(f"{key} gives rows without tokens and labels, which gmt-tune try cannot count")
        lengths += [len(tokens) for tokens, _ in answers]
        largest = max([largest, *(max(tokens, default=0) for tokens, _ in answers)])
        if max_seq_len is not None and max(len(tokens) for tokens, _ in answers) > max_seq_len:
            answers = _answers(dataset[index], pairs)
        counts = [sum(label != CROSS_ENTROPY_IGNORE_IDX for label in labels) for _, labels in answers]
        in_loss += sum(counts)
        kept += sum(len(tokens) for tokens, _ in answers)
        without += min(counts) == 0
        seen += 1
    assert lengths
    cut = sum(length > max_seq_len for length in lengths) / len(lengths) if max_seq_len is not None else 0.0
    packs = None
    if is_packed:
        mean = sum(min(length, max_seq_len) for length in lengths) / len(lengths)
        packs = max(1, int(n * mean / max_seq_len))
    return Rows(
        rows=n,
        seen=seen,
        median=int(statistics.median(lengths)),
        longest=max(lengths),
        cut=cut,
        in_loss=in_loss / max(1, kept),
        without_loss=without / seen,
        largest_id=int(largest),
        packs=packs,
    )


def _answers(row: Any, pairs: bool) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of a row: one, or of pairs two."""
    names = [("tokens", "labels")]
    if pairs:
        names = [(f"{kind}_input_ids", f"{kind}_labels") for kind in ("chosen", "rejected")]
    if not all(name in row for both in names for name in both):
        return []
    return [(list(row[tokens]), list(row[labels])) for tokens, labels in names]


@dataclass(frozen=True)
class Plan:
    """The steps of a real run, and what it saves.

    Attributes:
        steps_of_an_epoch, steps: optimizer steps.
        rows_of_a_step: in all processes.
        warmup: steps in which the learning rate rises; None where the schedule does not say.
        rates: learning rate at the first step, in the middle and at the last one, and at its highest; empty where the
            schedule does not say.
        saves: checkpoints that are written, the last one included.
        weights_bytes, state_bytes: of a checkpoint on disk; the last one has no state.
        kept_bytes: of all that is there at the most, about.
    """

    steps_of_an_epoch: int
    steps: int
    rows_of_a_step: int
    warmup: int | None
    rates: list[float]
    saves: int
    weights_bytes: int
    state_bytes: int
    kept_bytes: int


def plan(cfg: DictConfig, rows: int, devices: int, parameters: int, estimate: Estimate | None) -> Plan:
    """Steps, learning rates and checkpoints of a run on so many devices.

    Args:
        rows: or packs, of the data set.
        parameters: of the model.
        estimate: of its memory; None leaves the size of a training state out.

    Raises:
        UserError: if the rows do not fill a step.
    """
    from gmt_tune.integrations.torchtune.checkpoint.space import space_needed

    parallel = devices // cfg.get("tensor_parallel_dim", 1)
    accumulation = cfg.gradient_accumulation_steps
    data.check_enough_rows(rows, cfg.batch_size, parallel, accumulation)
    batches = -(-rows // parallel) // cfg.batch_size
    steps_of_an_epoch = batches // accumulation
    if (most := cfg.get("max_steps_per_epoch", None)) is not None:
        steps_of_an_epoch = min(steps_of_an_epoch, most)
    steps = steps_of_an_epoch * cfg.epochs
    every = cfg.get("save_every_n_steps", None)
    saves = sum(bool(every and step % every == 0) or step % steps_of_an_epoch == 0 for step in range(1, steps + 1))
    weights = parameters * {"bf16": 2, "fp32": 4}[cfg.dtype]
    held = [] if estimate is None else [r for r in estimate.rows if r.name in ("optimizer states", "gradient mask")]
    state = devices * sum(row.device_bytes + row.host_bytes for row in held)
    kept = space_needed(weights, state, saves - 1, cfg.get("keep_last_n_checkpoints", None))
    section = cfg.get("lr_scheduler", None)
    warmup = section.get("num_warmup_steps", None) if section is not None else None
    return Plan(
        steps_of_an_epoch=steps_of_an_epoch,
        steps=steps,
        rows_of_a_step=cfg.batch_size * parallel * accumulation,
        warmup=warmup,
        rates=_rates(cfg, steps),
        saves=saves,
        weights_bytes=weights,
        state_bytes=state,
        kept_bytes=kept,
    )


def _rates(cfg: DictConfig, steps: int) -> list[float]:
    lr = cfg.optimizer.get("lr", None)
    if lr is None:
        return []
    if cfg.get("lr_scheduler", None) is None:
        return [lr] * 4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = config.instantiate(cfg.lr_scheduler, optimizer, num_training_steps=steps, last_epoch=-1)
    if not isinstance(scheduler, LambdaLR):
        return []
    rates = [lr * scheduler.lr_lambdas[0](step) for step in range(steps)]
    return [rates[0], rates[steps // 2], rates[-1], max(rates)]
