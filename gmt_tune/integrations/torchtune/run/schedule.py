"""What torchtune's handling of learning rate schedulers lacks."""

import logging

from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
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
    """Let the scheduler of the first optimizer drive all, also those whose learning rate is a tensor.

    torchtune's wrapper assigns a number to each optimizer's learning rate. torchao's optimizers hold it as a
    tensor that their compiled update refers to, and refuse a number: it is changed in place instead.
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


def report_new_schedule(
    lr_scheduler, next_step: int, lr: float, *, epochs: tuple[int, int], steps: tuple[int, int]
) -> None:
    """Say so where a resumed run spreads its learning rate over another number of steps than the run before.

    ``lr`` is that of step ``next_step`` by the old schedule; ``epochs`` and ``steps`` are of the run before, and now.
    """
    if lr_scheduler is None or steps[0] == steps[1]:
        return
    change = ""
    if isinstance(lr_scheduler, LambdaLR):
        next_lr = lr_scheduler.base_lrs[0] * lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch + 1)
        change = f": it is {lr:.4g} at step {next_step} and {next_lr:.4g} at the one after"
    remedy = ". To keep the old course, set epochs as it was" if epochs[0] != epochs[1] else ""
    utils.log_rank_zero(
        log,
        f"lr_scheduler spreads the learning rate over {steps[1]} steps (epochs is {epochs[1]}), and did over "
        f"{steps[0]} (epochs was {epochs[0]}){change}{remedy}.",
    )
