"""What forward and backward need besides the states: the model's own code, run on the meta device and counted.

A layer, or the head (final norm, output layer and loss), runs forward and backward under autograd as in a training
step, on tensors that have shapes and no memory. So whatever a family does (norms of its own, attention that is not
fused, soft-capping, tied embeddings, biases) is in the numbers, and nothing here knows its name. Compilation is left
out; it needs less.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import NoneType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary
from torchtune import rlhf, training
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss

from gmt_tune.errors import one_line
from gmt_tune.models.losses import LinearCrossEntropyLoss

OFFLOAD_STASH = 5  # saved tensors that torchtune's OffloadActivations keeps on the device


class NotRun(Exception):
    """Of a model whose activations cannot be counted; says why."""


@dataclass(frozen=True)
class Passing:
    """Bytes that a part of the model needs in a step.

    Attributes:
        kept: by autograd, from its forward to its backward pass.
        forward, backward: the most that there is during each, with what is kept; weights are not counted.
    """

    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def layer_bytes(
    layer: nn.Module, batch: torch.Size, dtype: torch.dtype, *, checkpointed: bool, gradients_stay: bool
) -> Passing:
    """What one layer of a decoder needs; without checkpointing its input counts only where autograd saves it.

    Args:
        layer: takes and gives hidden states; on the meta device.
        batch: shape of the hidden states, [batch, sequence, width].
        checkpointed: whether it is computed again in the backward pass, from its input.
        gradients_stay: whether those of its parameters are counted from the moment on when they are made; else each
            counts as long as it is made, since it is then added to what is there, or used up.
    """

    def output(hidden: Tensor) -> Tensor:
        with _FusedAttention():  # in here, for backward to enter it again
            return layer(hidden)

    def loss(hidden: Callable[[], Tensor]) -> Tensor:
        return _Rest.apply(checkpoint(output, hidden(), use_reentrant=False) if checkpointed else output(hidden()))

    return _run(loss, batch, dtype, layer, gradients_stay)


def kind_of(layer: nn.Module) -> Hashable:
    """The same for layers that need the same: of equal modules with equal settings and shapes of parameters."""
    settings = tuple(
        (name, type(module), *((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str, NoneType))))
        for name, module in layer.named_modules()
    )
    return settings, tuple((p.shape, p.requires_grad) for p in layer.parameters())


def head_bytes(
    model: TransformerDecoder,
    batch: torch.Size,
    dtype: torch.dtype,
    *,
    loss: type | None,
    chunks: int,
    pairs: bool = False,
    gradients_stay: bool,
) -> Passing:
    """What the final norm, the output layer and the loss need.

    Args:
        model: on the meta device; its layers are not run.
        batch, gradients_stay: as for :func:`layer_bytes`.
        loss, chunks: the class of the loss, and in how many pieces it takes the logits; 0 for all at once.
        pairs: whether the batch is of chosen and rejected answers, whose loss needs a reference model's logits, too.
    """
    unembed = model.unembed
    labels = torch.empty(batch[:2], dtype=torch.int64, device="meta")
    is_linear = isinstance(loss, type) and issubclass(loss, LinearCrossEntropyLoss)
    linear = LinearCrossEntropyLoss(chunks) if is_linear else None
    chunked = CEWithChunkedOutputLoss(chunks) if chunks and not is_linear else None

    def log_probs(logits: Tensor) -> list[Tensor]:
        halves = list(zip(logits.chunk(2), labels.chunk(2), strict=True))
        return [rlhf.get_batch_log_probs(*half) for half in halves] + [half.detach().mean() for half, _ in halves]

    def compute(hidden: Callable[[], Tensor]) -> Tensor:
        if pairs:
            policy = log_probs(unembed(hidden()))
            with torch.no_grad():
                reference = log_probs(unembed(hidden()))
            return (policy[0] - policy[1] - reference[0] + reference[1]).mean()
        if linear:
            with linear.of(labels):
                return unembed(hidden())
        logits = unembed(hidden())
        if chunked:
            return chunked(logits, labels)
        logits = logits.reshape(-1, logits.size(-1))
        return F.cross_entropy(logits, labels.reshape(-1))

    if linear:
        linear.attach_(model)
    model.set_num_output_chunks(chunks if chunked else 0)
    return _run(compute, batch, dtype, model, gradients_stay)


def decoder(model: nn.Module) -> TransformerDecoder:
    """The same model; raises NotRun if it is none of torchtune's make."""
    if not isinstance(model, TransformerDecoder):
        raise NotRun(f"a {type(model).__name__} is no TransformerDecoder of torchtune")
    return model


def on_one_of(model: nn.Module, shapes: dict[str, torch.Size], devices: int) -> nn.Module:
    """A copy of a model on the meta device, as one of several devices of tensor parallelism computes it.

    Args:
        shapes: of its parameters on that device.

    Raises:
        NotRun: if its heads cannot be divided so.
    """
    part: Any = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        module, _, key = name.rpartition(".")
        local = nn.Parameter(parameter.new_empty(shapes[name]), requires_grad=parameter.requires_grad)
        setattr(part.get_submodule(module), key, local)
    try:
        training.prepare_mha_for_tp(part, SimpleNamespace(size=lambda: devices))
    except ValueError as error:
        raise NotRun(f"tensor_parallel_dim {devices} does not fit the model ({one_line(error)})") from None
    if isinstance(model.output, nn.Linear) and shapes["output.weight"] != model.output.weight.shape:
        part.output.register_forward_hook(lambda module, args, logits: torch.cat([logits] * devices, dim=-1))
    return part


# ---------------------------------------------------------------------------- how it is counted


class _Rest(torch.autograd.Function):
    """In place of what follows a layer: takes its output, and gives a gradient for it that nothing else holds."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape = output.shape
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(ctx.shape)


class _Count(TorchDispatchMode):
    """Counts the bytes of all meta tensors that are made within it, while they are there.

    Args:
        given: tensors that are not counted, nor views of them.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()  # storages
        for tensor in given:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.is_meta:
                storage = made.untyped_storage()
                if storage not in self._seen:
                    self._seen[storage] = True
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._drop, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _drop(self, n_bytes: int) -> None:
        self.live -= n_bytes


class _FusedAttention(TorchFunctionMode):
    """Attention as GPUs compute it: without the scores, which the meta device would make."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        options = {key: kwargs[key] for key in ("dropout_p", "is_causal", "scale") if key in kwargs}
        return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], **options)[0]


def _run(
    compute: Callable[[Callable[[], Tensor]], Tensor],
    batch: torch.Size,
    dtype: torch.dtype,
    module: nn.Module,
    gradients_stay: bool,
) -> Passing:
    """Run ``compute`` and its backward pass; what it is given makes hidden states, which nothing else holds."""
    source = torch.empty((), dtype=dtype, device="meta", requires_grad=True)

    def hidden() -> Tensor:
        return source.expand(batch).clone(memory_format=torch.contiguous_format)

    given = (source, *module.parameters(), *module.buffers())
    try:
        with _gradients(module, gradients_stay), _Count(given) as count, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what has no fused kernel on the meta device
            loss = compute(hidden)
            kept, forward, count.peak = count.live - loss.nbytes, count.peak, 0
            loss.backward()
    except Exception as error:  # anything that a model's code may raise
        raise NotRun(f"the model does not run without data ({one_line(error)})") from None
    return Passing(kept, forward, count.peak)


@contextmanager
def _gradients(module: nn.Module, stay: bool) -> Iterator[None]:
    """Whether gradients stay within it; none is left behind."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    hooks = [] if stay else [p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
