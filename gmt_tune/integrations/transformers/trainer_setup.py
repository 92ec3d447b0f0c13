"""What a Trainer may not be set up with, where a gradient mask is to act."""

import os

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments

# Optimizers that step inside the backward pass, a parameter at a time, and drop each gradient at once.
_STEPS_IN_BACKWARD = ("lomo", "adalomo")

_FSDP1 = (
    "FSDP version 1 flattens parameters together, so that no threshold of a tensor can be found: "
    "set fsdp_config={'version': 2} (FSDP2); transformers 4 takes it from the environment: FSDP_VERSION=2"
)


def refuse_unmaskable_arguments(args: TrainingArguments) -> None:
    """Raise ValueError if, with these arguments, no step hook sees the whole gradient."""
    if args.fsdp and _fsdp_version(args) == 1:
        raise ValueError(_FSDP1)
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _STEPS_IN_BACKWARD or optim.endswith("layerwise"):
        raise ValueError(
            f"optim={optim!r} updates weights during the backward pass, before gradients are accumulated and can "
            "be masked: use adamw_torch, or adamw_torch_8bit for less memory"
        )


def _fsdp_version(args: TrainingArguments) -> int:
    if hasattr(args, "fsdp_plugin_args"):
        return (args.fsdp_plugin_args or {}).get("fsdp_version", 2)
    return int(os.environ.get("FSDP_VERSION", 1))  # transformers 4 leaves it to accelerate's own variable


def refuse_unmaskable_model(model: nn.Module) -> None:
    """Raise ValueError if gradients arrive as pieces whose place in their tensor is unknown: FSDP version 1."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(_FSDP1)
