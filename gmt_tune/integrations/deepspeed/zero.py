"""Where ZeRO keeps what the mask works on.

ZeRO flattens the parameters of a group one behind the other, gives each process a range of the result, and steps the
optimizer that it wraps on fp32 copies of these ranges, a group at a time. By then gradients are accumulated, reduced,
unscaled and clipped, and nothing of them need be gathered: counts of entries are added up over the processes.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gmt_tune.masking import GradientMask
from gmt_tune.masking.flat import FlatShard
from gmt_tune.masking.optimizers import CompactOptimizer


def register(mask: GradientMask, engine: Any) -> RemovableHandle:
    """Mask the gradients that a DeepSpeed engine's optimizer applies, right before each of its steps.

    Make the mask before ``deepspeed.initialize``, so that what it freezes is left out of the optimizer.

    Args:
        mask: of the model's ``named_parameters()``.
        engine: what ``deepspeed.initialize`` returned, with ZeRO stage 1, 2 or 3; or its ``optimizer``.

    Returns:
        A handle; ``handle.remove()`` ends the masking.

    Raises:
        TypeError: if there is no ZeRO optimizer.
        ValueError: for what cannot be masked: parts of a tensor on other processes than those of a ZeRO group, a step
            that goes past the wrapped optimizer, scope "global" with several groups; see also
            :meth:`gmt_tune.GradientMask.register`.

    A score of your own gets flattened ranges, as :class:`gmt_tune.masking.flat.FlatShard` says.

    Example:
        >>> mask = GradientMask(model.named_parameters(), density=0.2)
        >>> engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        >>> handle = register(mask, engine)
    """
    zero = zero_optimizer(engine)
    if zero is None:
        raise TypeError(
            f"{type(getattr(engine, 'optimizer', engine)).__name__} is no ZeRO optimizer: set zero_optimization.stage "
            "to 1, 2 or 3 in DeepSpeed's configuration"
        )
    _refuse_unmaskable(zero)
    shards = dict(_shards(zero))
    flat = {id(shard.within) for shard in shards.values()}
    if len(flat) > 1 and (scopes := mask.scopes_of_several()):
        raise ValueError(
            f"scope '{scopes[0]}' needs all gradients at once, and ZeRO steps {len(flat)} groups one behind the other: "
            "use scope 'tensor', or one parameter group (and in stage 3 a sub_group_size that holds all)"
        )
    return mask.register(zero.optimizer, shards=shards)


def zero_optimizer(engine: Any) -> Any:
    """The ZeRO optimizer of ``engine``: an engine, accelerate's wrapper, or this object itself; None if there is none.

    Its attribute ``optimizer`` is the ``torch.optim.Optimizer`` that it wraps.
    """
    for candidate in (engine, getattr(engine, "optimizer", None)):
        if type(candidate).__module__.startswith("deepspeed.runtime.") and hasattr(candidate, "real_dp_process_group"):
            return candidate
        if hasattr(candidate, "fp32_partitioned_groups_flat"):
            return candidate
    return None


def _refuse_unmaskable(zero: Any) -> None:
    """Raise ValueError if the wrapped optimizer does not step whole ranges of what ZeRO shards."""
    if type(zero).__name__ not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"):
        raise ValueError(f"the gradients of DeepSpeed's {type(zero).__name__} cannot be masked: use ZeRO 1, 2 or 3")
    if getattr(zero, "zenflow", False):
        raise ValueError("zenflow steps past the optimizer's hooks: remove it from zero_optimization")
    if getattr(zero, "swap_optimizer", False):
        raise ValueError(
            "offload_optimizer.device nvme has gradients on disk, where they cannot be masked: set it to cpu or none"
        )
    if getattr(zero, "offload_optimizer", False) and getattr(zero, "partial_offload", 1.0) != 1.0:
        raise ValueError("offload_optimizer.ratio below 1 steps two optimizers, of which one is masked: set it to 1")
    if getattr(zero, "has_moe_layers", False):
        raise ValueError("DeepSpeed's expert parallelism is not supported by the gradient mask: shard with ZeRO alone")
    group = getattr(zero, "model_parallel_group", None)
    if (group is not None and dist.get_world_size(group) > 1) or getattr(zero, "autoep_folding_tp_group", None):
        raise ValueError(
            "DeepSpeed's tensor parallelism cuts tensors before ZeRO does, so that no threshold of a tensor can be "
            "found: shard with ZeRO alone"
        )
    if not isinstance(zero.optimizer, Optimizer):
        raise ValueError(f"{type(zero.optimizer).__name__} runs no step hooks: use torch.optim.AdamW")
    if isinstance(zero.optimizer, CompactOptimizer):
        raise ValueError(
            "CompactAdamW takes gradients before ZeRO reduces them: use another optimizer, or shard with FSDP2"
        )


def _shards(zero: Any) -> Iterator[tuple[Tensor, FlatShard]]:
    """For each parameter that ZeRO trains what this process holds of it, in an order that all processes share."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3: each parameter is cut into equal ranges
        for group in zero.fp16_groups:
            for p in group:
                number, start, size = zero.grad_position[zero.get_param_id(p)]
                rank = dist.get_rank(p.ds_process_group)
                held = tuple(min(edge, p.ds_numel) for edge in (rank * size, (rank + 1) * size))
                flat = zero.fp32_partitioned_groups_flat[number]
                yield p, FlatShard(flat, start, p.ds_numel, held, p.ds_process_group)
        return
    if hasattr(zero, "bf16_groups"):
        flats, models = zero.fp32_groups_flat_partition, zero.bf16_groups
    else:
        flats, models = zero.single_partition_of_fp32_groups, zero.bit16_groups
    for flat, group, processes in zip(flats, models, zero.real_dp_process_group, strict=True):
        for p in group:
            start, held = 0, (0, 0)
            if (mapping := p._hp_mapping) is not None:
                here, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                start, held = here.start, (whole.start, whole.start + here.numel)
            yield p, FlatShard(flat, start, p.numel(), held, processes)
