"""Soft-capped logits: Gemma 2 bounds them smoothly, as ``cap * tanh(logits / cap)``."""

import torch
from torch import Tensor
from torchtune.modules.tied_linear import Linear


class SoftCappedLinear(Linear):
    """The linear layer of torchtune's ``TiedLinear``, with soft-capped outputs.

    Args:
        softcap: no output is larger in magnitude. ``LinearCrossEntropyLoss`` reads it too, because it computes the
            logits itself.
    """

    def __init__(self, softcap: float) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., embed_dim]."""
        return torch.tanh(super().forward(x, weight) / self.softcap) * self.softcap
