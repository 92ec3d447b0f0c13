"""What torchtune's handling of optimizers and their schedules lacks."""

import logging

from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer
from torchtune import utils

log = utils.get_logger("INFO")


def warn_of_long_warmup(cfg_lr_scheduler: DictConfig | None, num_training_steps: int) -> None:
    """Say so if the learning rate is still rising when the run ends; a short trial of a config is meant to do that."""
    warmup = (cfg_lr_scheduler or {}).get("num_warmup_steps", None)
    if isinstance(warmup, (int, float)) and warmup >= num_training_steps:
        utils.log_rank_zero(
            log,
            f"lr_scheduler.num_warmup_steps is {warmup}, but the run has {num_training_steps} optimizer "
            f"step{'s' * (num_training_steps != 1)}: the learning rate rises to its end and does not reach "
            "optimizer.lr. Lower num_warmup_steps for a real run.",
            level=logging.WARNING,
        )


def keep_tensor_lr(lr_scheduler, optimizers: list[Optimizer]) -> None:
    """Let one scheduler drive an optimizer per parameter, also those whose learning rate is a tensor.

    torchtune's wrapper assigns a number to each optimizer's learning rate. torchao's optimizers hold it as a
    tensor that their compiled update refers to, and refuse a number: it is changed in place instead.

    Args:
        lr_scheduler: of the first optimizer; its ``step`` is replaced.
        optimizers: all of them.
    """
    advance = type(lr_scheduler).step

    def step() -> None:
        advance(lr_scheduler)
        lr = lr_scheduler.get_last_lr()[0]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    lr_scheduler.step = step
