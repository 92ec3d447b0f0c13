"""Keeps NaN and infinity out of the weights: all ranks look at loss and gradients together, and decide the same."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torchtune import utils

from gmt_tune.errors import UserError
from gmt_tune.masking.optimizers import CompactOptimizer

log = utils.get_logger("INFO")

_REMEDY = "Lower the learning rate, set clip_grad_norm, look at these rows"


class FiniteCheck:
    """Whether an optimizer step may change weights. All ranks call each method together, and get the same answer.

    Args:
        optimizers: of the model.
        steps_in_backward: whether they step inside backward: before all gradients are there.
        skips: leave a step out whose numbers are not finite, and count it, instead of raising.
        rows_of_step, in_words: positions in the data set of this rank's rows of the step; such positions in messages.
        checkpoints: of the run; one that is being written is completed before the run ends.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        *,
        steps_in_backward: bool = False,
        skips: bool,
        rows_of_step: Callable[[], list[int]],
        in_words: Callable[[list[int]], str],
        checkpoints,
        max_seq_len: int | None,
    ) -> None:
        self.skipped_steps = 0
        self._model, self._skips, self._max_seq_len = model, skips, max_seq_len
        self._rows_of_step, self._in_words, self._checkpoints = rows_of_step, in_words, checkpoints
        self._is_own_loss_finite: Tensor | None = None
        self._names: dict = {p: name for name, p in model.named_parameters()}
        self._sums: dict[str, Tensor] = {}  # of gradients that were stepped with: finite if all their entries are
        self._steps_in_backward, self._optimizers = steps_in_backward, optimizers
        if steps_in_backward:
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(self._note_gradients)

    def _note_gradients(self, optimizer: Optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._sums[self._names[p]] = _local(p.grad).sum(dtype=torch.float32)

    def note_loss(self, loss: Tensor) -> None:
        """Note this rank's own loss of the step: whether it is finite decides whose rows a message names."""
        self._is_own_loss_finite = torch.isfinite(loss).all()

    def allows_step(self, step: int, loss: Tensor, num_tokens: Tensor) -> bool:
        """Before weights change: whether loss and gradients are finite.

        ``loss``, summed or a mean, and ``num_tokens`` are of the step and over all ranks, 0-d; ``step`` counts from 1.
        Raises UserError if they are not finite, and such steps are not skipped.
        """
        loss = loss.detach() / num_tokens  # the mean over no token is NaN
        gradients = [] if self._steps_in_backward else self._gradients()
        if not _on_any_rank(may_be_bad(loss, [grad for _, grad in gradients])):
            return True
        bad = _of_all_ranks([name for name, grad in gradients if not torch.isfinite(grad).all()])
        if not bad and torch.isfinite(loss):  # a norm can overflow where no entry does
            return True
        is_empty = not bad and num_tokens.item() == 0
        what = f"no token of step {step} is in the loss" if is_empty else _what_is_not_finite(bad, step)
        where = f"{what}, {self._rows(all_ranks=is_empty)}"
        if self._skips:
            self.skipped_steps += 1
            utils.log_rank_zero(log, f"Left out a step: {where}.")
            return False
        if is_empty:
            self._end(
                f"{where}: no answer is left of these rows with tokenizer.max_seq_len {self._max_seq_len}: raise it, "
                "or delete these rows"
            )
        skip = "" if self._steps_in_backward else ", or set on_nonfinite: skip"
        self._end(f"{where}; no weight was changed by it. {_REMEDY}{skip}")

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """What this rank holds of gradients, by name of the parameter."""
        gradients = [(name, _local(p.grad)) for p, name in self._names.items() if p.grad is not None]
        for optimizer in self._optimizers:
            if isinstance(optimizer, CompactOptimizer):
                for part, is_nonfinite in optimizer.nonfinite():
                    name = self._names[part.parameter]
                    # Of entries that are not selected, only the flag is left
                    gradients += [(name, part.local), (name, torch.where(is_nonfinite, torch.nan, 0.0))]
        return gradients

    def check_after_backward(self, step: int) -> None:
        """Raise UserError if optimizers that step inside backward have met a gradient that is not finite."""
        if not self._steps_in_backward:
            return
        sums, self._sums = self._sums, {}
        is_bad = ~torch.isfinite(torch.stack(list(sums.values())))
        if _on_any_rank(is_bad.any()):
            bad = _of_all_ranks([name for name, is_its in zip(sums, is_bad.tolist(), strict=True) if is_its])
            where = f"{_what_is_not_finite(bad, step)}, {self._rows()}"
            self._end(f"{where}; weights have changed by it in backward, and are not saved. {_REMEDY}")

    def _rows(self, all_ranks: bool = False) -> str:
        """The rows of the step, in words; of all ranks, or only of those whose loss is not finite, if there are any."""
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self._rows_of_step(), bool(self._is_own_loss_finite)))
        # Reduction has mixed the gradients of all ranks: only a loss shows whose rows they were
        suspects = [rows for rows, is_finite in found if not is_finite and not all_ranks]
        return self._in_words(sorted({row for rows in suspects or [rows for rows, _ in found] for row in rows}))

    def _end(self, what: str) -> NoReturn:
        self._checkpoints.finish()
        sentence = f"{what}; the last checkpoint: {self._checkpoints.last_saved or 'none yet'}"
        raise UserError(sentence)


def may_be_bad(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """Whether the loss or the gradients' norm is not finite: bool, 0-d, on the loss's device."""
    # With fsdp_cpu_offload, gradients are on the CPU and the loss is not
    return ~(torch.isfinite(loss) & torch.isfinite(get_total_norm(gradients)).to(loss.device))


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _on_any_rank(is_bad: Tensor) -> bool:
    count = is_bad.float()
    if dist.get_world_size() > 1:
        dist.all_reduce(count)
    return count.item() > 0


def _of_all_ranks(names: list[str]) -> list[str]:
    """The names that any rank has found, none of them twice."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, names)
    return list(dict.fromkeys(name for names in found for name in names))


def _what_is_not_finite(bad: list[str], step: int) -> str:
    more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    what = f"the gradient of '{bad[0]}'{more}" if bad else "the loss"
    return f"{what} holds NaN or infinity at step {step}"
