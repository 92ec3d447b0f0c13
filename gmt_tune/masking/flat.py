"""What an optimizer of flat tensors holds of a parameter: a range of its entries, as DeepSpeed's ZeRO does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["FlatShard"]

_AS_IT_IS = {torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten.clone, torch.ops.aten._to_copy}


class FlatShard(Tensor):
    """A parameter, flattened, of which this process holds one range, as a piece of a flat tensor of many parameters.

    It has the whole parameter's number of entries, and no memory of its own. Its ``grad`` is the same piece of the flat
    tensor's gradient. Operations that work entry by entry give another one; all others raise.

    Args:
        within: 1-d, what the optimizer steps.
        start: where in it the piece begins.
        numel: entries of the whole parameter.
        held: which of them this process holds: the first, and the one behind the last; the same one twice for none.
        group: of the processes that hold the rest; None if this one holds all.
    """

    within: Tensor
    start: int
    held: tuple[int, int]
    groups: tuple[Any, ...]

    @staticmethod
    def __new__(
        cls, within: Tensor, start: int, numel: int, held: tuple[int, int], group: dist.ProcessGroup | None = None
    ) -> FlatShard:
        shard = Tensor._make_wrapper_subclass(
            cls, (numel,), dtype=within.dtype, device=within.device, requires_grad=within.requires_grad
        )
        shard.within, shard.start, shard.held = within, start, held
        shard.groups = () if group is None or dist.get_world_size(group) == 1 else (group,)
        return shard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def local(self) -> Tensor:
        """The entries that this process holds, 1-d, sharing the flat tensor's memory."""
        return self.within.detach().narrow(0, self.start, self.held[1] - self.held[0])

    @property
    def grad(self) -> FlatShard | None:  # type: ignore[override]
        grad = self.within.grad
        return None if grad is None else self._at_same_place(grad, self.start)

    def _at_same_place(self, within: Tensor, start: int) -> FlatShard:
        (group,) = self.groups or (None,)
        return FlatShard(within, start, self.numel(), self.held, group)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard(entries {self.held[0]} to {self.held[1]} of {self.numel()})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = (args, kwargs or {})
        shard = next(value for value in tree_flatten(given)[0] if isinstance(value, FlatShard))
        if torch.Tag.pointwise in func.tags or func.overloadpacket in _AS_IT_IS:
            args, kwargs = tree_map_only(FlatShard, lambda s: s.local, given)
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.shape == shard.local.shape:
                return shard._at_same_place(result, 0)
        raise NotImplementedError(
            f"{func.overloadpacket} needs a whole tensor, and this process holds one range of its flattened entries: "
            "use operations that work entry by entry, such as products, or shard with FSDP2"
        )
