"""What torchtune's handling of optimizers lacks for torchao's."""

from torch import Tensor
from torch.optim import Optimizer


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
