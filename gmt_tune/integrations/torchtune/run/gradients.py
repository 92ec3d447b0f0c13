"""Keeps NaN and infinity out of what a run saves: all ranks look at loss and gradients together, and act the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtune import utils

from gmt_tune.errors import UserError
from gmt_tune.masking.host import to_host
from gmt_tune.masking.nonfinite import nonfinite_flags
from gmt_tune.masking.optimizers import CompactOptimizer, outside_graphs

log = utils.get_logger("INFO")

_REMEDY = "Lower the learning rate, set clip_grad_norm, look at these rows"


@dataclass
class StepCheck:
    """What was looked at of one optimizer step, and what was found: on the devices, not read yet.

    Attributes:
        step: counted from 1.
        batches: this rank's micro-batches of the step: (epoch, number in it).
        loss, num_tokens: the mean over all ranks, and over how many tokens, 0-d.
        is_own_loss_finite: of this rank's loss: decides whose rows a message names. 0-d bool.
        names: of parameters; one can come twice.
        flags: for each, whether its gradient holds NaN or infinity, 0-d bool.
    """

    step: int
    batches: list[tuple[int, int]]
    loss: Tensor
    num_tokens: Tensor
    is_own_loss_finite: Tensor
    names: list[str]
    flags: list[Tensor]

    def on_any_rank(self) -> Tensor:
        """Above 0 if the loss or a gradient is not finite: fp32, 0-d, on the loss's device. All ranks call it."""
        # With fsdp_cpu_offload, gradients are on the CPU and the loss is not
        by_device: dict[torch.device, list[Tensor]] = {}
        for flag in self.flags:
            by_device.setdefault(flag.device, []).append(flag)
        is_bad = ~torch.isfinite(self.loss)
        for flags in by_device.values():
            is_bad = is_bad | torch.stack(flags).any().to(is_bad.device)
        count = is_bad.float()
        if dist.get_world_size() > 1:
            dist.all_reduce(count)
        return count


class FiniteCheck:
    """Whether loss and gradients are finite. All ranks call each method together, and get the same answer.

    Args:
        optimizers: of the model.
        steps_in_backward: whether they step inside backward: before all gradients are there.
        skips: leave a step out whose numbers are not finite, and count it, instead of raising.
        is_late: launch the step before the host knows, so that it does not wait for the device: what was found is in
            :meth:`end_step`. Not where ``skips``.
        rows_of, in_words: positions in the data set of this rank's rows of micro-batches; such positions in messages.
        checkpoints: of the run; one that is being written is completed before the run ends.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer] = (),
        *,
        steps_in_backward: bool = False,
        skips: bool,
        is_late: bool = False,
        rows_of: Callable[[list[tuple[int, int]]], list[int]],
        in_words: Callable[[list[int]], str],
        checkpoints,
        max_seq_len: int | None,
    ) -> None:
        self.skipped_steps = 0
        self._model, self._skips, self._max_seq_len = model, skips, max_seq_len
        self._rows_of, self._in_words, self._checkpoints = rows_of, in_words, checkpoints
        self._is_own_loss_finite: Tensor | None = None
        self._names: dict = {p: name for name, p in model.named_parameters()}
        self._is_late = is_late and not skips
        self._unread: StepCheck | None = None
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}  # of gradients that were stepped with
        self._steps_in_backward, self._optimizers = steps_in_backward, optimizers
        if steps_in_backward:
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(outside_graphs(self._note_gradients))

    def _note_gradients(self, optimizer: Optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and (entries := _local(p.grad)).numel():
                    self._extremes[self._names[p]] = entries.aminmax()  # NaN if an entry is; in a single launch

    def note_loss(self, loss: Tensor) -> None:
        """Note this rank's own loss of the step: whether it is finite decides whose rows a message names."""
        self._is_own_loss_finite = torch.isfinite(loss).all()

    def allows_step(self, step: int, loss: Tensor, num_tokens: Tensor, batches: Sequence[tuple[int, int]]) -> bool:
        """Before weights change: whether loss and gradients are finite, as far as that is known now.

        ``loss``, summed or a mean, and ``num_tokens`` are of the step and over all ranks, 0-d; ``step`` and ``batches``
        are as :class:`StepCheck` has them. Raises UserError if numbers are not finite, and such steps are not skipped.
        """
        loss = loss.detach() / num_tokens  # the mean over no token is NaN
        assert self._is_own_loss_finite is not None
        gradients = ([], []) if self._steps_in_backward else self._gradients()
        check = StepCheck(step, list(batches), loss, num_tokens, self._is_own_loss_finite, *gradients)
        if self._is_late or self._steps_in_backward:
            self._unread = check
        if self._is_late or not check.on_any_rank().item():
            return True
        if not self._skips:
            self._end(check, is_late=False)
        self.skipped_steps += 1
        what, _ = self._find(check)
        utils.log_rank_zero(log, f"Left out a step: {what}.")
        return False

    def _gradients(self) -> tuple[list[str], list[Tensor]]:
        """Of what this rank holds of gradients: names of parameters, and flags."""
        names = [name for p, name in self._names.items() if p.grad is not None]
        entries = [_local(p.grad) for p in self._names if p.grad is not None]
        taken: list[Tensor] = []
        for optimizer in self._optimizers:
            if isinstance(optimizer, CompactOptimizer):
                for part, is_nonfinite in optimizer.nonfinite():
                    names.append(self._names[part.parameter])
                    entries.append(part.local)
                    taken.append(is_nonfinite)  # of entries that are not selected, only the flag is left
        return names + names[len(names) - len(taken) :], nonfinite_flags(entries) + taken

    def end_step(self) -> StepCheck | None:
        """The step's check, unless all of it was read before the step. Does not wait for the device."""
        check, self._unread = self._unread, None
        if check is None:
            return None
        if extremes := dict(self._extremes):
            self._extremes.clear()
            is_finite = torch.stack([value for pair in extremes.values() for value in pair]).isfinite()
            is_finite = is_finite.view(-1, 2).all(1)  # the smallest and the largest entry
            check.names += extremes
            check.flags += is_finite.logical_not().unbind()
        return check

    def end_run(self, check: StepCheck) -> NoReturn:
        """Raise UserError for a check of :meth:`end_step` that has found something. All ranks call it together."""
        self._end(check, is_late=True)

    def _end(self, check: StepCheck, *, is_late: bool) -> NoReturn:
        what, is_empty = self._find(check)
        self._checkpoints.finish()
        if is_empty:
            length = self._max_seq_len
            what += (
                f": no answer is left of these rows with tokenizer.max_seq_len {length}: raise it, or delete these rows"
            )
        else:
            what += "; weights have changed by it, and are not saved" if is_late else "; no weight was changed by it"
            what += f". {_REMEDY}{'' if self._steps_in_backward else ', or set on_nonfinite: skip'}"
        what += f"; the last checkpoint: {self._checkpoints.last_saved or 'none yet'}"
        raise UserError(what)

    def _find(self, check: StepCheck) -> tuple[str, bool]:
        """What is not finite, and in which rows of the data; whether it is only that no token is in the loss."""
        own = [name for name, flag in zip(check.names, to_host(check.flags), strict=True) if flag]
        bad = _of_all_ranks(own)
        is_empty = not bad and check.num_tokens.item() == 0
        what = f"no token of step {check.step} is in the loss" if is_empty else _what_is_not_finite(bad, check.step)
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self._rows_of(check.batches), bool(check.is_own_loss_finite)))
        # Reduction has mixed the gradients of all ranks: only a loss shows whose rows they were
        suspects = [rows for rows, is_finite in found if not is_finite and not is_empty]
        rows = sorted({row for rows in suspects or [rows for rows, _ in found] for row in rows})
        return f"{what}, {self._in_words(rows)}", is_empty


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _of_all_ranks(names: list[str]) -> list[str]:
    """The names that any rank has found, none of them twice."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, names)
    return list(dict.fromkeys(name for names in found for name in names))


def _what_is_not_finite(bad: list[str], step: int) -> str:
    more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    what = f"the gradient of '{bad[0]}'{more}" if bad else "the loss"
    return f"{what} holds NaN or infinity at step {step}"
