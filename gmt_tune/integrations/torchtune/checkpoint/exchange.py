"""What a recipe and its checkpoints hand to each other, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gmt_tune.masking import GradientMask
from gmt_tune.masking.tracker import SelectionTracker


@dataclass(frozen=True)
class TrainingParts:
    """What a recipe trains with, once it is set up: saved from here, and restored into here.

    Attributes:
        optimizers: one, or with optimizer in backward, one for each parameter.
        lr_scheduler: of the learning rate; None without one.
        checkpointer: torchtune's, which writes the model's files.
        tracker: of overlap and coverage, if there is one.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    lr_scheduler: Any
    mask: GradientMask | None
    tracker: SelectionTracker | None
    device: torch.device
    checkpointer: Any


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run is between two optimizer steps.

    Attributes:
        global_step: optimizer steps done.
        epoch: the current one, from 0.
        samples: rows of this epoch that all ranks together have seen.
        steps_in_epoch: optimizer steps of this epoch done.
        steps_per_epoch, total_epochs: of the run, which the learning rate's schedule spans.
        skipped_steps: that were left out, since their gradients were not finite.
        is_final: the run is complete, and nothing that resuming needs is kept.
        val_loss: at this step; None without a validation.
        tokens: that the steps were divided by, in all; None where a version that did not count them began the run.
    """

    global_step: int
    epoch: int
    samples: int
    steps_in_epoch: int
    steps_per_epoch: int
    total_epochs: int
    skipped_steps: int
    seed: int
    is_final: bool
    val_loss: float | None = None
    tokens: int | None = None
