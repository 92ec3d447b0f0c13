"""What a Trainer's run leaves in its output folder for ``gmt-tune report``: the same files as a recipe's run."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments

from gmt_tune.masking import GradientMask
from gmt_tune.masking.optimizers import CompactOptimizer
from gmt_tune.reporting.foreign_logs import as_recipes_log
from gmt_tune.reporting.mask_metrics import MaskMetrics
from gmt_tune.reporting.run_log import RunLog


class TrainerRunLog:
    """Writes ``run_log.jsonl`` and ``mask_detail.jsonl``, on one process of all."""

    def __init__(
        self,
        mask: GradientMask,
        metrics: MaskMetrics,
        model: nn.Module,
        optimizer: Optimizer,
        args: TrainingArguments,
        state: TrainerState,
    ) -> None:
        self._metrics = metrics
        self._log = None
        if state.is_world_process_zero:
            self._log = RunLog(str(args.output_dir), _config(mask, model, optimizer, args))
            self._log.truncate_after(state.global_step)

    def log(self, step: int, logs: Mapping[str, object]) -> None:
        """Append what the Trainer logged at a step."""
        if self._log is not None:
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            self._log.log(step, as_recipes_log(numbers))

    def log_mask(self, step: int) -> dict[str, float]:
        """Append the mask's numbers by parameter, where that is due.

        Returns the same by module and by layer; nothing where it is not due, and on the other processes.
        """
        if self._log is None:
            return {}
        return self._metrics.by_group(self._log.log_mask(step, self._metrics.detail))


def _config(mask: GradientMask, model: nn.Module, optimizer: Optimizer, args: TrainingArguments) -> dict[str, object]:
    """A run's set-up under the names that a recipe's config has, as far as a Trainer has the like."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    optim = str(getattr(args.optim, "value", args.optim))
    if isinstance(optimizer, CompactOptimizer):
        optim = type(optimizer).__name__
    return {
        "model": {"_component_": type(model).__name__},
        "checkpointer": {"checkpoint_dir": name or None},
        "gradient_mask": mask.policy(),
        "optimizer": {"_component_": optim, "lr": args.learning_rate},
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "dtype": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "seed": args.seed,
    }
