"""Whether the checkpoints to come fit on the disk, by an estimate that refuses only what cannot end well."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import folder as folders
from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts
from gmt_tune.masking.optimizers import CompactOptimizer


def check_space(output_dir: Path, parts: TrainingParts, saves: int, keep_last_n: int | None) -> None:
    """Raise UserError if the disk of a run's folder has fewer bytes left than the checkpoints to come need.

    Args:
        output_dir: the run's.
        parts: to be saved.
        saves: how many checkpoints will be written before the last one.
        keep_last_n: as ``keep_last_n_checkpoints``.
    """
    weights = sum(p.numel() * p.element_size() for p in parts.model.parameters())
    state = int(_state_bytes(parts))
    existing = sum(size for c in folders.list_checkpoints(output_dir) for size, _ in c.files.values())
    needed = space_needed(weights, state, saves, keep_last_n, existing)
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"output_dir {output_dir} has {free / 2**30:.2f} GiB free, but the checkpoints need about "
            f"{needed / 2**30:.2f} GiB: free space, choose another output_dir, or lower keep_last_n_checkpoints"
        )


def space_needed(weights: int, state: int, saves: int, keep_last_n: int | None, existing: int = 0) -> int:
    """Bytes that the checkpoints to come add to the disk at the least, while there are most of them.

    Args:
        weights: bytes of one checkpoint's model.
        state: bytes that a checkpoint which is not the last one holds besides.
        saves: how many such checkpoints will be written before the last one.
        keep_last_n: as ``keep_last_n_checkpoints``; a new checkpoint is whole before the oldest is discarded.
        existing: bytes of earlier checkpoints; they count against it where they will be discarded.
    """
    if keep_last_n is None:
        return saves * (weights + state) + weights
    whole = weights + state
    in_between = min(saves, keep_last_n + 1) * whole
    at_the_end = min(saves, keep_last_n) * whole + weights
    return max(in_between, at_the_end) - existing


def host_bytes_of_save(
    *,
    weights: int,
    largest_weight: int,
    state: int,
    largest_state: int,
    processes: int,
    is_async: bool,
    on_host: bool = False,
) -> int:
    """Bytes of the host's memory that a save takes in the process that takes most, rank 0, besides what it holds.

    Of the Hugging Face checkpointer with safetensors; another one takes ``weights`` at the least. Pages of files that
    the system has not written yet are not counted: it can write them at any time.

    Args:
        weights: bytes of the whole model, as it is saved.
        largest_weight: bytes of the largest of its tensors.
        state: bytes of the training state that a process saves: its part, where that is sharded.
        largest_state: bytes of the largest tensor of these.
        processes: that train together.
        is_async: with ``enable_async_checkpointing``.
        on_host: training runs on the CPU.
    """
    if is_async:
        return weights + state + largest_weight
    is_whole_there = on_host and processes == 1  # and is written from where it is, unless it is converted
    return max(largest_weight if is_whole_there else 2 * largest_weight, 0 if on_host else largest_state)


def _state_bytes(parts: TrainingParts) -> float:
    """Bytes that the optimizers will keep, and, of compact ones, of the selection that says whose states these are."""
    optimizer: Any = parts.optimizers[0]
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    if parts.mask is None or not isinstance(optimizer, CompactOptimizer):
        return sum(_state_bytes_per_entry(optimizer, p) * p.numel() for p in trained)
    masked = sum(p.numel() for p in parts.mask.masked_parameters.values())
    dense = sum(p.numel() for p in trained) - masked
    moments = {8: 2.0, "fp8": 2.0, 4: 1.0}.get(getattr(optimizer, "state_bits", 32), 8.0)
    return moments * dense + (parts.mask.density * (moments + 2) + 1 / 8) * masked  # 2 bytes of age, 1 bit of selection


def _state_bytes_per_entry(optimizer: torch.optim.Optimizer, p: Tensor) -> float:
    """Bytes that an optimizer keeps for each entry of a parameter; a lower bound for kinds that are not known."""
    kind = type(optimizer).__name__.lower()
    if "sgd" in kind and not optimizer.param_groups[0].get("momentum"):
        return 0.0
    for part, size in (("8bit", 1.0), ("fp8", 1.0), ("4bit", 0.5)):
        if part in kind:
            return 2 * size
    return (2 if "adam" in kind else 1) * p.element_size()
