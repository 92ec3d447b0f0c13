"""CompactAdamW in a Trainer: made by the Trainer with its own parameter groups, and with the Trainer's clipping."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from gmt_tune.integrations.transformers.log_order import calling
from gmt_tune.masking import GradientMask
from gmt_tune.masking.optimizers import CompactOptimizer
from gmt_tune.optim import CompactAdamW

# ``state_bits`` of what TrainingArguments(optim=...) may name
_STATE_BITS: dict[str, int] = {
    "adamw_torch": 32,
    "adamw_torch_fused": 32,
    "paged_adamw_32bit": 32,
    "adamw_torch_8bit": 8,
    "adamw_8bit": 8,
    "adamw_bnb_8bit": 8,
    "paged_adamw_8bit": 8,
    "adamw_torch_4bit": 4,
}

_FP16 = "fp16 scales gradients, and CompactAdamW would take them still scaled: set bf16=True"


def check_compact_options(mask_class: type[GradientMask], mask_options: dict[str, Any], **options: Any) -> None:
    """Raise TypeError or ValueError if CompactAdamW refuses these options, or such a mask, whatever the model is."""
    weight = nn.Parameter(torch.zeros(1))
    mask = mask_class([("weight", weight)], **{**mask_options, "dense": (), "frozen": ()})
    given = {name: value for name, value in options.items() if value is not None}
    mask.register(CompactAdamW([weight], **given))


def state_bits_of(optim: str) -> int:
    """The ``state_bits`` of what ``optim`` names; ValueError if CompactAdamW has no counterpart of it."""
    if optim not in _STATE_BITS:
        raise ValueError(
            f"compact=True has no counterpart of optim={optim!r}: choose one of {', '.join(_STATE_BITS)}, or "
            "compact=False"
        )
    return _STATE_BITS[optim]


def refuse_uncompactable(model: nn.Module, args: TrainingArguments, wrapper: Any) -> None:
    """Raise ValueError if gradients are taken before they are what will be applied, or states cannot be saved.

    Args:
        model: as it is trained, sharded and moved.
        args: the Trainer's.
        wrapper: in which accelerate steps the optimizer.
    """
    if getattr(wrapper, "scaler", None) is not None:
        raise ValueError(_FP16)
    is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if args.world_size > 1 and not is_sharded:
        raise ValueError(
            f"CompactAdamW takes gradients before DDP reduces them over the {args.world_size} processes: set fsdp=True "
            "with fsdp_config={'version': 2} (FSDP2)"
        )
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
    if is_sharded and saves and not args.save_only_model:
        raise ValueError(
            "the Trainer's checkpoints of sharded optimizer states cannot hold those of CompactAdamW, which exist for "
            "selected entries alone: set save_strategy='no', and call trainer.save_model() behind the training, or "
            "save_only_model=True"
        )


def make_compact(trainer: Trainer, *, state_bits: int | str | None, bf16_stochastic_round: bool) -> bool:
    """Let a Trainer make a CompactAdamW, with its own parameter groups, where it would make an AdamW.

    Args:
        trainer: that has no optimizer yet.
        state_bits: None takes what ``optim`` says.
        bf16_stochastic_round: see CompactAdamW.

    Returns:
        False if it has a CompactAdamW, or knows how to make it, already.

    Raises:
        ValueError: if it has an optimizer of another kind, or settings of ``optim`` that have no counterpart.
    """
    args, given = trainer.args, trainer.optimizer_cls_and_kwargs
    if args.fp16:
        raise ValueError(_FP16)
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "compact=True takes gradients before DeepSpeed reduces them: leave it out, or leave deepspeed out and set "
            "fsdp=True with fsdp_config={'version': 2} (FSDP2)"
        )
    if isinstance(trainer.optimizer, CompactOptimizer) or (given is not None and given[0] is CompactAdamW):
        return False
    if trainer.optimizer is not None or given is not None:
        raise ValueError(
            "compact=True makes the optimizer, and this Trainer was given one: leave it out, or give it a CompactAdamW"
        )
    if optim_args := args.optim_args:
        raise ValueError(
            f"compact=True does not read optim_args={optim_args!r}: leave it out, and give state_bits and "
            "bf16_stochastic_round to GradientMaskCallback"
        )
    bits_of_optim = state_bits_of(str(getattr(args.optim, "value", args.optim)))
    trainer.optimizer_cls_and_kwargs = (
        CompactAdamW,
        {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "state_bits": bits_of_optim if state_bits is None else state_bits,
            "bf16_stochastic_round": bf16_stochastic_round,
        },
    )
    return True


def trainer_in_construction() -> Trainer:
    """The Trainer whose constructor is running.

    ``on_init_end`` is the only event before the Trainer makes its optimizer, and the Trainer's
    ``optimizer_cls_and_kwargs`` says what to make.
    """
    if (trainer := calling(Trainer)) is None:
        raise RuntimeError("compact=True needs a Trainer: pass the callback to its constructor, callbacks=[...]")
    return trainer


def check_made_compact(optimizer: Optimizer, args: TrainingArguments, *, by_trainer: bool) -> None:
    """Raise ValueError unless the Trainer made the optimizer that ``make_compact`` asked for."""
    if not isinstance(optimizer, CompactOptimizer):
        raise ValueError(
            f"compact=True, and the optimizer is {type(optimizer).__name__}: leave out what asks for it, and pass the "
            "callback to the Trainer's constructor, callbacks=[...], or a CompactAdamW as optimizers=(optimizer, None)"
        )
    if by_trainer and (lr := optimizer.defaults["lr"]) != args.learning_rate:
        raise ValueError(
            f"learning_rate was {lr} when the Trainer was made, and is {args.learning_rate} now: with compact=True, "
            "set it before"
        )


class ClippingInOptimizer:
    """The Trainer's ``max_grad_norm``, applied by the optimizer from here on.

    The Trainer clips what is in ``p.grad`` behind the last backward pass of a step, which with compact gradients is
    only what is dense or due. It does so if ``max_grad_norm`` is above 0; so, from the start of a step to its end, that
    is 0, and in between what the user wrote.

    Raises:
        ValueError: if the optimizer has another ``max_grad_norm`` than the training arguments.
    """

    def __init__(self, optimizer: CompactOptimizer, args: TrainingArguments) -> None:
        self._optimizer, self._args, self._own = optimizer, args, optimizer.max_grad_norm
        self._max_norm = args.max_grad_norm
        # Without clipping, the Trainer computes the norm for its logs all the same
        max_norm = self._max_norm if self._max_norm > 0 else math.inf
        if self._own not in (None, max_norm):
            raise ValueError(
                f"max_grad_norm is {self._own} in the optimizer and {self._max_norm} in the training arguments: leave "
                "it out of the optimizer, which gets that of the training arguments"
            )
        optimizer.max_grad_norm = max_norm

    def begin_step(self) -> None:
        self._args.max_grad_norm = 0.0

    def end_step(self) -> None:
        self._args.max_grad_norm = self._max_norm

    def end(self) -> None:
        self.end_step()
        self._optimizer.max_grad_norm = self._own

    def logs(self) -> dict[str, float]:
        """What the Trainer's logs should say of the norm, which it computed without the compact gradients."""
        norm = self._optimizer.grad_norm
        return {} if norm is None else {"grad_norm": norm.item()}
