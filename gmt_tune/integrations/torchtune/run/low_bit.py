"""torchao's low-bit optimizers under FSDP2, with weights in bf16."""

from torch import Tensor
from torch.optim import Optimizer


def show_states_as_float32_(optimizer: Optimizer) -> None:
    """Let the states that one of torchao's low-bit optimizers will make for sharded weights have the dtype float32.

    In newer releases, states show the dtype of the weights, but a view of one, as DTensor takes it, shows float32: in
    bf16, ``torch.compile`` ends the first step with an error. What is stored, and computed from it, is the same.
    Other optimizers stay as they are.
    """
    zeros = getattr(optimizer, "_subclass_zeros", None)
    if zeros is None:
        return

    def float32_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
        return zeros(p, signed, block_size).float()

    optimizer._subclass_zeros = float32_zeros  # type: ignore[attr-defined]
