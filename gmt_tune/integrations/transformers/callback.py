"""GradientMaskCallback: connects a GradientMask to the Hugging Face Trainer, and to trainers derived from it.

The mask acts as a step pre-hook on the innermost torch optimizer, not in ``on_pre_optimizer_step``. Both come after
accumulation, reduction and clipping. But the hook runs if and only if the optimizer steps, while the event also
announces steps that the fp16 gradient scaler then skips; it runs after every other callback that changes gradients; and
it is the code path of a plain PyTorch loop. Its price is the assumption that the optimizer steps through
``torch.optim.Optimizer``: ``on_optimizer_step`` stops a run in which that does not hold.

What can be masked is decided in ``trainer_setup``; files of a checkpoint are read and written in ``checkpoint``; what a
compact optimizer needs besides is in ``compact``.
"""

from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gmt_tune.integrations import deepspeed
from gmt_tune.integrations.transformers.checkpoint import restore_mask, save_mask
from gmt_tune.integrations.transformers.compact import (
    ClippingInOptimizer,
    check_compact_options,
    check_made_compact,
    make_compact,
    refuse_uncompactable,
    trainer_in_construction,
)
from gmt_tune.integrations.transformers.log_order import ShortLine, arrange, calling
from gmt_tune.integrations.transformers.run_files import TrainerRunLog
from gmt_tune.integrations.transformers.trainer_setup import refuse_unmaskable_arguments, refuse_unmaskable_model
from gmt_tune.masking import GradientMask
from gmt_tune.masking.optimizers import CompactOptimizer, unwrap_optimizer
from gmt_tune.masking.tracker import SelectionTracker, check_every
from gmt_tune.reporting.mask_metrics import MaskMetrics, for_a_line


class GradientMaskCallback(TrainerCallback):
    """Masks the gradient right before each optimizer step of a Trainer.

    The mask's metrics join the Trainer's training logs: ``mask/density``, ``mask/seconds`` and
    ``mask/threshold_median`` in the printed line and ``state.log_history``; for reporters (TensorBoard, W&B) and your
    own callbacks also ``mask/threshold_min`` and ``_max``, and by module and layer ``mask_density_by_module/...`` and
    so on: at first with every log, later seldom. The mask's state is saved to and restored from the Trainer's
    checkpoints (``gradient_mask.pt``). The output folder gets the files that ``gmt-tune report`` draws. With a PEFT
    model only the adapters require gradients, so they are masked.

    Args:
        density: fraction of entries that stay, in (0, 1]. 1.0 masks nothing: the same bits as without callback.
        mask_class: GradientMask, or a subclass of it with a score of its own.
        track_selection_every: optimizer steps between two looks at overlap and coverage (``mask/overlap``,
            ``mask/coverage``), at 2 bits of memory per masked entry; None does not look. Begins again on resuming.
        log_by_group: give the numbers by module and layer to reporters; ``gmt-tune report`` has them in any case.
        compact: have the Trainer make a :class:`gmt_tune.CompactAdamW` where it would make an AdamW: gradients and
            states of selected entries alone. Learning rate, betas, decay, schedule and clipping are the Trainer's; the
            logged ``grad_norm`` is then that of selected entries and dense parameters.
        state_bits: of its moments, 32, 8, 4 or "fp8"; None takes what ``optim`` says (``adamw_torch_8bit``: 8).
        bf16_stochastic_round: of CompactAdamW: bfloat16 weights are rounded up or down by chance.
        options: all else that ``mask_class`` takes: ``score``, ``scope``, ``refresh_every``, ``dense``, ``frozen``,
            ``seed``, ``error_if_nonfinite`` (on CUDA: at the end of the step, before anything is logged or saved).

    Raises:
        TypeError, ValueError: if an argument is out of its range or misspelt; from the Trainer's constructor on,
            if a pattern matches no parameter, the optimizer is masked already, or gradients cannot be reached (see
            ``trainer_setup``).

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GradientMaskCallback(density=0.2)])
    """

    def __init__(
        self,
        density: float,
        *,
        mask_class: type[GradientMask] = GradientMask,
        track_selection_every: int | None = None,
        log_by_group: bool = True,
        compact: bool = False,
        state_bits: int | str | None = None,
        bf16_stochastic_round: bool = False,
        **options: Any,
    ) -> None:
        if not (isinstance(mask_class, type) and issubclass(mask_class, GradientMask)):
            raise TypeError(f"mask_class must be GradientMask or a subclass of it, got {mask_class!r}")
        self._mask_class, self._options = mask_class, {"density": density, **options}
        # A mask over any one parameter refuses all that needs no model to be seen as wrong: say it here, where
        # the user's line is still in the traceback. What patterns match is seen in on_init_end.
        mask_class([("weight", torch.nn.Parameter(torch.zeros(1)))], **{**self._options, "dense": (), "frozen": ()})
        if track_selection_every is not None:
            check_every(track_selection_every, "track_selection_every")
        self._track_selection_every = track_selection_every
        self._log_by_group = log_by_group
        if not isinstance(compact, bool):
            raise TypeError(f"compact must be True or False, got {compact!r}")
        self._compact: dict[str, Any] | None = None
        if compact:
            self._compact = {"state_bits": state_bits, "bf16_stochastic_round": bf16_stochastic_round}
            check_compact_options(mask_class, self._options, **self._compact)
        elif state_bits is not None or bf16_stochastic_round:
            raise ValueError("state_bits and bf16_stochastic_round are those of CompactAdamW: add compact=True")
        self._clipping: ClippingInOptimizer | None = None
        self._metrics: MaskMetrics | None = None
        self._run_log: TrainerRunLog | None = None
        self._mask: GradientMask | None = None
        self._handles: list[RemovableHandle] = []
        self._short_line = ShortLine()
        self._optimizer_stepped = self._is_made_by_trainer = False

    @property
    def mask(self) -> GradientMask | None:
        """The mask of the training that runs or ran last; None before the first."""
        return self._mask

    def log_first(self, trainer: Trainer) -> None:
        """Let the Trainer's reporters (TensorBoard, W&B, ...) have the mask's metrics as well.

        Training begins with this by itself; what is left for a call is a Trainer of which another method logs first.
        """
        arrange(trainer.callback_handler, self, self._short_line)

    # ------------------------------------------------------------------ events, in the order they come

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs) -> None:
        """Refuse what cannot work before anything is loaded, and freeze before the optimizer is made."""
        refuse_unmaskable_arguments(args)
        if model is not None:
            self._build_mask(model)
        if self._compact is not None:
            self._is_made_by_trainer = make_compact(trainer_in_construction(), **self._compact)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control, model=None, optimizer=None, **kwargs
    ) -> None:
        """Build the mask from the parameters as they now are (sharded, moved), restore it, hook it up."""
        self._unhook()  # a training that ended in an exception, or is tried again with a smaller batch
        refuse_unmaskable_arguments(args)
        refuse_unmaskable_model(model)
        if (handler := calling(CallbackHandler)) is not None:
            arrange(handler, self, self._short_line)
        mask = self._build_mask(model)
        zero = deepspeed.zero_optimizer(optimizer)
        wrapper, optimizer = optimizer, unwrap_optimizer(optimizer) if zero is None else zero.optimizer
        if self._compact is not None:
            check_made_compact(optimizer, args, by_trainer=self._is_made_by_trainer)
        is_compact = isinstance(optimizer, CompactOptimizer)
        if is_compact and zero is None:
            refuse_uncompactable(model, args, wrapper)
        self._handles = [mask.register(optimizer) if zero is None else deepspeed.register(mask, zero)]
        self._handles.append(optimizer.register_step_pre_hook(self._note_step))
        if state.global_step > 0:
            try:
                restore_mask(mask, args, state, optimizer if is_compact else None)
            except Exception:
                self._unhook()
                raise
        if is_compact:
            optimizer.zero_grad()  # what a training took in that ended within a step
            self._clipping = ClippingInOptimizer(optimizer, args)
        self._mask = mask
        tracker = None
        if self._track_selection_every is not None:
            tracker = SelectionTracker(mask, self._track_selection_every)
            self._handles.append(tracker.register(optimizer))
        self._metrics = MaskMetrics(mask, tracker)
        self._run_log = TrainerRunLog(mask, self._metrics, model, optimizer, args, state)
        self._optimizer_stepped = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        if self._clipping is not None:
            self._clipping.begin_step()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        if self._clipping is not None:
            self._clipping.end_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control, optimizer=None, **kwargs
    ) -> None:
        """Stop a run whose optimizer went past the hook, rather than train it without the mask."""
        was_skipped = getattr(optimizer, "step_was_skipped", False)
        by_deepspeed = was_skipped and deepspeed.zero_optimizer(optimizer) is not None
        if by_deepspeed and not args.fp16 and self._mask is not None and self._mask.error_if_nonfinite:
            raise RuntimeError(
                f"a gradient holds NaN or infinity at optimizer step {state.global_step + 1}, which DeepSpeed left "
                "out: lower the learning rate or look at the data; to go on without such steps, set "
                "error_if_nonfinite=False"
            )
        if not self._optimizer_stepped and not was_skipped:
            name = type(unwrap_optimizer(optimizer)).__name__
            raise RuntimeError(
                f"the optimizer {name} changed weights without calling its step hooks, so its gradients were not "
                "masked: choose another optim, such as adamw_torch"
            )
        self._optimizer_stepped = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs=None, **kwargs) -> None:
        """Add the mask's metrics to the Trainer's own training logs, and all of these to the run's files."""
        if self._run_log is None or self._metrics is None or not logs:
            return
        if "loss" not in logs:
            self._run_log.log(state.global_step, logs)
            return
        # Asked on every rank: the metrics of a sharded gradient may need them all.
        metrics = self._metrics.totals() | (self._clipping.logs() if self._clipping is not None else {})
        self._run_log.log(state.global_step, {**logs, **metrics})
        by_group = self._run_log.log_mask(state.global_step)
        line = for_a_line(metrics)
        if state.log_history:  # holds a copy that the Trainer made before this event
            state.log_history[-1].update(line)
        if self._log_by_group:
            metrics.update(by_group)
        logs.update(metrics)
        self._short_line.leave_out(metrics.keys() - line.keys())

    def on_save(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs) -> None:
        if self._mask is not None:
            save_mask(self._mask, args, state, is_compact=self._clipping is not None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control, **kwargs) -> None:
        """Take the hooks off: the optimizer may go on to be used without the mask."""
        self._unhook()

    def _build_mask(self, model: torch.nn.Module) -> GradientMask:
        return self._mask_class(model.named_parameters(), **self._options)

    def _note_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._optimizer_stepped = True

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._clipping is not None:
            self._clipping.end()
            self._clipping = None
