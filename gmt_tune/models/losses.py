"""A loss that never holds all logits: what saves most memory beside a compact optimizer, with large vocabularies."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gmt_tune.errors import UserError

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(nn.Module):
    """Mean cross-entropy, computed by the output layer itself, chunk by chunk, together with its gradients.

    Only one chunk's logits are alive at a time, and one gradient of the output layer. The chunked loss of torchtune
    keeps all logits until the backward pass. Equal to that to rounding. Logits are soft-capped where the output layer
    has a ``softcap``, as Gemma 2's has.

    Args:
        num_chunks: how many; more take less memory.
        ignore_index: label of positions that do not count.

    Raises:
        UserError: if ``num_chunks`` is no whole number from 1 on.
    """

    def __init__(self, num_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__()
        if isinstance(num_chunks, bool) or not isinstance(num_chunks, int) or num_chunks < 1:
            raise UserError(f"loss.num_chunks must be a whole number from 1 on, got {num_chunks!r}")
        self.num_chunks, self.ignore_index = num_chunks, ignore_index
        self._labels: Tensor | None = None

    def attach_(self, model: nn.Module) -> None:
        """Let a torchtune model's output layer return the loss within :meth:`of`, and logits elsewhere."""
        output: Any = model.output
        layer = output if isinstance(output, nn.Module) else output.linear  # of tied weights
        given = layer.forward

        def forward(hidden: Tensor, *weight: Any) -> Tensor:
            if self._labels is None:
                return given(hidden, *weight)
            return self._loss(hidden, weight[0] if weight else layer.weight, getattr(layer, "softcap", None))

        layer.forward = forward

    @contextmanager
    def of(self, labels: Tensor) -> Iterator[None]:
        """Within it, the model returns the loss of these labels, [batch, sequence], shifted to the outputs."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def _loss(self, hidden: Tensor, weight: Any, softcap: float | None) -> Tensor:
        if isinstance(weight, DTensor):
            raise UserError(
                "LinearCrossEntropyLoss needs the whole output layer, which tensor parallelism cuts: set "
                "loss._component_=torchtune.modules.loss.CEWithChunkedOutputLoss"
            )
        assert self._labels is not None
        labels = self._labels.reshape(-1)
        return _LinearCrossEntropy.apply(
            hidden.reshape(labels.numel(), -1), weight, labels, self.ignore_index, self.num_chunks, softcap
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward pass, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunks: int, softcap: float | None
    ) -> Tensor:
        counted = (labels != ignore_index).sum()
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=hidden.device)
        size = -(-labels.numel() // chunks)
        for start in range(0, labels.numel(), size):
            part = slice(start, start + size)
            states, targets = hidden[part], labels[part]
            logits, slope = F.linear(states, weight).float(), None
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_probabilities = F.log_softmax(logits, dim=-1)
            if softcap is not None:
                slope = logits.div_(softcap).square_().neg_().add_(1)  # of softcap * tanh(logits / softcap)
            del logits
            loss += F.nll_loss(log_probabilities, targets, ignore_index=ignore_index, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            # Of the mean: probabilities less 1 at the label, by the number of labels, and 0 where none counts
            is_counted = (targets != ignore_index).unsqueeze(1)
            grad = log_probabilities.exp_()
            grad.scatter_add_(1, targets.where(is_counted[:, 0], 0).unsqueeze(1), -is_counted.to(grad.dtype))
            grad = grad.mul_(is_counted / counted)
            if slope is not None:
                grad = grad.mul_(slope)
            del slope
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, states)
        ctx.grads = grad_hidden, grad_weight  # not save_for_backward: offloading would move them to the host and back
        return loss / counted

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple:
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_loss) for grad in grads), None, None, None, None
