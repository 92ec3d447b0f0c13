"""What a training step holds besides weights and states, moment by moment: the largest of them is what it needs.

A step goes through its micro-batches' forward passes, losses and backward passes, layer by layer from the last one to
the first one, and then through the optimizer. Gradients come while activations go. Seen in simulated steps of every
shipped config (``gmt-tune memory --measure``).

Under FSDP2, a unit is gathered right before it is used, the next one in backward already while a layer is computed; and
its gradients are whole until they are reduced, which is waited for one unit later.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from gmt_tune.memory import activations as act
from gmt_tune.memory.compact import CompactBytes
from gmt_tune.memory.sharding import Mesh
from gmt_tune.memory.states import step_scratch_bytes
from gmt_tune.models.losses import LinearCrossEntropyLoss

MASK_SCRATCH = 8 * 2**20  # of the selection, besides 1/16 of the largest tensor


@dataclass(frozen=True)
class Moment:
    """Bytes on the device.

    Attributes:
        gradients: that the parameters have got by then.
        activations: kept for the backward pass.
        gathered: whole weights and gradients of units that FSDP2 shards.
        working: what else there is for a moment.
    """

    name: str
    gradients: int = 0
    activations: int = 0
    gathered: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.gathered + self.working


@dataclass(frozen=True)
class Job:
    """What a training step's memory follows from.

    Attributes:
        model: on the meta device.
        shapes, stepped: of all parameters and of those that are trained, as this device holds them.
        gathered: of all parameters, without data parallelism.
        units: entries of each module that FSDP2 gathers as one, and under "" of what belongs to none; empty without it.
        optimizer: class, options, and how it is named.
        compact: with CompactAdamW.
        loss: its class, if it can be known, and the pieces in which it takes the logits; 0 for all at once.
    """

    cfg: DictConfig
    model: nn.Module
    dtype: torch.dtype
    mesh: Mesh
    shapes: dict[str, torch.Size]
    stepped: dict[str, torch.Size]
    gathered: dict[str, torch.Size]
    units: Mapping[str, int]
    optimizer: tuple[type, dict, str]
    compact: CompactBytes | None
    loss: tuple[Any, int]

    @property
    def is_offloaded(self) -> bool:
        """As the recipe sees it: where FSDP2 shards nothing, it brings nothing back."""
        return bool(self.cfg.get("fsdp_cpu_offload", False)) and self.mesh.data > 1 and not self.on_cpu

    @property
    def on_cpu(self) -> bool:
        return str(self.cfg.get("device", "cuda")).startswith("cpu")

    @property
    def in_backward(self) -> bool:
        return bool(self.cfg.get("optimizer_in_bwd", False))

    @property
    def has_reference(self) -> bool:
        return has_reference(self.cfg)

    @property
    def accumulates(self) -> bool:
        """Whether there are gradients already when a micro-batch's loss is computed."""
        return not self.in_backward and self.cfg.get("gradient_accumulation_steps", 1) > 1

    @property
    def layer(self) -> int:
        """Entries of the largest layer that FSDP2 gathers."""
        return max((n for name, n in self.units.items() if "layers." in name), default=0)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients, on whichever device, as the optimizer step finds them."""
        e = self.dtype.itemsize
        if self.compact is not None:
            return self.compact.gradients + self.compact.whole
        if not self.in_backward:
            return e * sum(shape.numel() for shape in self.stepped.values())
        if self.mesh.data > 1:
            return e * -(-max(self.units.values()) // self.mesh.data)
        return e * self.largest

    def gradient_of(self, name: str) -> int:
        """Bytes of a parameter's gradient, if it is trained, without data parallelism: as backward makes it."""
        return self.dtype.itemsize * self.gathered[name].numel() if name in self.stepped else 0

    @property
    def largest(self) -> int:
        """Entries of the largest tensor that is trained."""
        return max((shape.numel() for shape in self.stepped.values()), default=0)


@dataclass(frozen=True)
class Activations:
    """What a micro-batch needs on the device besides weights and gradients.

    Attributes:
        first, last: of the model's layers; head: final norm, output layer and loss.
        kept, on_host: bytes that all layers keep for backward, on the device and on the host.
        note: how these come about.
    """

    first: act.Passing
    last: act.Passing
    head: act.Passing
    kept: int
    on_host: int
    note: str


def has_reference(cfg: DictConfig) -> bool:
    """Whether a reference model runs beside the one that is trained: DPO, on pairs of sequences."""
    return cfg.get("ref_checkpointer", None) is not None


def moments(job: Job, passing: Activations | None) -> Iterator[Moment]:
    """The moments of a step that can be its largest one.

    Args:
        job: of this device.
        passing: of a micro-batch; None leaves out what depends on activations.
    """
    gradients = 0 if job.is_offloaded else job.gradients
    yield Moment("optimizer step", gradients, working=_step_scratch(job))
    if passing is None:
        return
    e, is_sharded = job.dtype.itemsize, job.mesh.data > 1
    before = gradients if job.accumulates else 0
    tied = "output.weight" not in job.shapes
    head, embeddings = (job.gradient_of(f"{name}.weight") for name in ("output", "tok_embeddings"))
    head = embeddings if tied else head
    waiting = head if tied else 0  # for the gradient of the embeddings, at the end of backward
    # Weights that FSDP2 has gathered: what belongs to no module is, during forward and during backward
    rest, layer = e * job.units.get("", 0), e * job.layer
    all_weights = 0 if job.cfg.get("fsdp_reshard_after_forward", True) else e * sum(job.units.values())
    with_head = all_weights or rest + e * job.units.get("output", 0)

    kept = passing.kept
    loss, _ = job.loss
    if inspect.isclass(loss) and issubclass(loss, LinearCrossEntropyLoss):
        gathered = with_head + e * job.units.get("output", 0)  # what it was gathered into is there until the next one
        yield Moment("loss and gradient of the output layer", before, kept, gathered, passing.head.peak)
    else:
        yield Moment("logits and loss", before, kept, all_weights, passing.head.forward)
        yield Moment("backward of loss and output layer", before, kept, with_head, passing.head.backward)
    if job.in_backward:
        yield Moment("optimizer step of the output layer", gradients, kept, rest, _step_scratch(job))

    # Beside a layer's weights there are the next one's, and the gradients before, which are being reduced
    gathered = (all_weights - e * job.units.get("output", 0) if all_weights else rest + 2 * layer) + head * is_sharded
    waits = 0 if is_sharded else waiting
    there = before or (0 if job.in_backward or job.is_offloaded or waits else head // job.mesh.data)
    working = passing.last.peak - passing.last.kept
    yield Moment("backward of the last layer", there, kept, gathered, working + waits)
    prefetched = e * job.units.get("tok_embeddings", 0)
    lacking = 0 if before else (layer + prefetched) // job.mesh.data
    gathered = rest + 2 * layer + max(layer, prefetched)
    there, working = max(0, gradients - lacking), passing.first.peak - passing.first.kept
    yield Moment("backward of the first layer", there, passing.first.kept, gathered, working + waiting)
    # Under FSDP2 it is there whole, and copied for its reduction; else it is added to that of the step so far
    working = 3 * waiting if tied else embeddings if job.accumulates and not is_sharded else 0
    yield Moment("gradient of the embeddings", gradients, 0, rest + layer + 2 * prefetched, working)


def activations(job: Job, batch_size: int, seq_len: int) -> Activations:
    """What a micro-batch needs: a layer of each kind is run, and the head.

    Raises:
        act.NotRun: if the model is of another make than torchtune's, or does not run without data.
    """
    tensor, is_sharded = job.mesh.tensor, job.mesh.data > 1
    model = act.decoder(act.on_one_of(job.model, job.gathered, tensor) if tensor > 1 else job.model)
    count, stay = len(model.layers), is_sharded or not (job.accumulates or job.in_backward or job.compact is not None)
    batch = torch.Size((batch_size, seq_len, model.tok_embeddings.embedding_dim))
    checkpointed, note = _checkpointed_layers(job.cfg, count)

    kinds = [act.kind_of(layer) for layer in model.layers]

    def of_kinds(checkpointed: bool) -> dict[Hashable, act.Passing]:
        return {
            kind: act.layer_bytes(layer, batch, job.dtype, checkpointed=checkpointed, gradients_stay=stay)
            for kind, layer in dict(zip(kinds, model.layers, strict=True)).items()
        }

    passing = of_kinds(checkpointed > 0)
    first, last = passing[kinds[0]], passing[kinds[-1]]
    inputs, whole = checkpointed * first.kept, 0
    if checkpointed < count:
        kept = of_kinds(False) if checkpointed else passing
        whole = sum(kept[kind].kept for kind in kinds) * (count - checkpointed) // count
    loss, chunks = job.loss
    head = act.head_bytes(
        model, batch, job.dtype, loss=loss, chunks=chunks, pairs=job.has_reference, gradients_stay=stay
    )
    if not job.cfg.get("enable_activation_offloading", False):
        return Activations(first, last, head, whole + inputs, 0, note)
    stash = min(act.OFFLOAD_STASH, checkpointed) * first.kept
    note = f"{note}, offloaded to the host but for {act.OFFLOAD_STASH}"
    return Activations(first, last, head, whole + stash, inputs, note)


def _checkpointed_layers(cfg: DictConfig, layers: int) -> tuple[int, str]:
    mode = cfg.get("ac_mode", None)
    if cfg.get("enable_activation_checkpointing", False) or mode == "full":
        return layers, "activation checkpointing keeps each layer's input"
    if mode == "selective" and str(cfg.get("ac_option", "")).isdigit():
        count = layers // int(cfg.ac_option)
        return count, f"selective checkpointing of {count} of {layers} layers"
    return 0, "all layers, without activation checkpointing"


def _step_scratch(job: Job) -> int:
    """Bytes that mask and optimizer need in the step, on the device."""
    if job.is_offloaded:
        return 0  # on the host
    if job.compact is not None:  # whole gradients are gone in the update
        return max(job.compact.selecting + MASK_SCRATCH, job.compact.updating - job.compact.whole)
    component, options, _ = job.optimizer
    at_once = job.largest if job.in_backward else sum(s.numel() for s in job.stepped.values())
    step = step_scratch_bytes(component, options, job.largest, job.dtype, at_once)
    if job.cfg.get("gradient_mask", None) is None:
        return step
    return max(step, job.largest * job.dtype.itemsize // 16 + MASK_SCRATCH)
