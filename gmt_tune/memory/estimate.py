"""From a config to the memory that each device needs, row by row.

The model is built on the meta device, so that a 70B model costs no memory here and needs no file. What happens
at the same time is added up; of what happens one after the other (loss, recomputing a layer, optimizer step)
the largest counts. Gradients are counted in full, as from the second micro-batch of a step on.
"""

import functools
import inspect
import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config, training

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.config.components import component_path, import_component, is_known_package
from gmt_tune.integrations.torchtune.config.mask import build_gradient_mask
from gmt_tune.masking import GradientMask
from gmt_tune.memory import activations as act
from gmt_tune.memory.compact import CompactBytes, compact_bytes
from gmt_tune.memory.sharding import Mesh, largest_units, local_shapes
from gmt_tune.memory.states import mask_bits_bytes, optimizer_state_bytes, step_scratch_bytes
from gmt_tune.models.losses import LinearCrossEntropyLoss
from gmt_tune.optim import CompactAdamW

GIB = 2**30
ASSUMED_SEQ_LEN = 2048
RESERVE = GIB  # CUDA context, kernels and library workspaces, and what the allocator cannot use
RESERVE_NCCL = GIB
MASK_SCRATCH = 8 * 2**20  # of the selection, besides 1/16 of the largest tensor


@dataclass(frozen=True)
class Row:
    """One demand, on one device."""

    name: str
    device_bytes: int
    host_bytes: int = 0  # for this device
    note: str = ""  # how it comes about
    exact: bool = False  # it follows from shapes and dtypes alone


@dataclass(frozen=True)
class Estimate:
    """The memory of one device, of ``world_size`` equal ones."""

    world_size: int
    device: str
    rows: list[Row]
    assumptions: list[str]

    @property
    def device_bytes(self) -> int:
        return sum(row.device_bytes for row in self.rows)

    @property
    def host_bytes(self) -> int:
        return sum(row.host_bytes for row in self.rows)


@dataclass(frozen=True)
class _Job:
    """What the rows are counted from."""

    cfg: DictConfig
    model: nn.Module  # on the meta device
    dtype: torch.dtype
    mesh: Mesh
    shapes: dict[str, torch.Size]  # of all parameters, as this device holds them
    stepped: dict[str, torch.Size]  # of those that are trained
    gathered: dict[str, torch.Size]  # of all parameters, gathered from the ranks that share data
    unit: int  # entries of the largest module that FSDP2 gathers as one
    rest: int  # entries of what belongs to no such module
    optimizer: tuple[type, dict, str]  # class, options, and how it is named
    compact: CompactBytes | None  # with CompactAdamW

    @property
    def offloaded(self) -> bool:
        return bool(self.cfg.get("fsdp_cpu_offload", False)) and self.mesh.data > 1

    @property
    def in_backward(self) -> bool:
        return bool(self.cfg.get("optimizer_in_bwd", False))

    @property
    def has_reference(self) -> bool:
        """Whether a reference model runs beside the one that is trained: DPO, on pairs of sequences."""
        return self.cfg.get("ref_checkpointer", None) is not None

    def lasting(self, name: str, count: int, note: str) -> Row:
        """A row of tensors that last: in the host's memory with ``fsdp_cpu_offload``."""
        if self.offloaded:
            return Row(name, 0, count, note + "; fsdp_cpu_offload: on the host", exact=True)
        return Row(name, count, note=note, exact=True)


def estimate(cfg: DictConfig, world_size: int = 1) -> Estimate:
    """What a run of this config needs on each device, one for each of ``world_size`` processes.

    ``cfg`` is of ``gmt_full_finetune`` or ``gmt_full_dpo``, or of torchtune's own full fine-tuning recipes. Raises
    UserError if it lacks a key that the arithmetic needs, or a component cannot be built.
    """
    for key in ("model", "optimizer", "batch_size", "dtype"):
        if cfg.get(key, None) is None:
            raise UserError(f"{key} is missing in the config: without it the memory cannot be estimated")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype)
    if dtype is None:
        raise UserError(f"dtype must be bf16 or fp32 for full fine-tuning, got {cfg.dtype!r}")
    mesh = _mesh(cfg, world_size)
    model = _meta_model(cfg, dtype)
    trainable = _apply_mask_patterns(cfg, model)
    plan = _tensor_parallel_plan(cfg) if mesh.tensor > 1 else None
    shapes = local_shapes(model, mesh, plan)
    gathered = local_shapes(model, Mesh(tensor=mesh.tensor), plan)
    separately = tuple(cfg.get("custom_sharded_layers", None) or ())
    unit, rest = largest_units(separately, gathered) if mesh.data > 1 else (0, 0)
    stepped = {name: shapes[name] for name in trainable}
    optimizer = _optimizer(cfg)
    compact = _compact(cfg, model, optimizer, stepped, dtype)
    job = _Job(cfg, model, dtype, mesh, shapes, stepped, gathered, unit, rest, optimizer, compact)
    nccl = RESERVE_NCCL if world_size > 1 else 0
    note = "CUDA context, workspaces, fragmentation" + (", NCCL buffers" if nccl else "")
    rows = [*_state_rows(job), *_activation_rows(job), *_sharding_rows(job), Row("reserve", RESERVE + nccl, note=note)]
    return Estimate(world_size, str(cfg.get("device", "cuda")), rows, _assumptions(job))


def _state_rows(job: _Job) -> list[Row]:
    e, model = job.dtype.itemsize, job.model
    weights = e * sum(shape.numel() for shape in job.shapes.values())
    total = sum(p.numel() for p in model.parameters())
    row = job.lasting("weights", weights, f"{_count(total)} parameters in {job.cfg.dtype}")
    if rope := _rope_bytes(model):  # on the device in any case
        row = replace(row, device_bytes=row.device_bytes + rope, note=row.note + ", rotary tables")
    rows = [row]
    if job.has_reference:
        rows.append(job.lasting("reference model", weights, "its weights alone"))
    if job.compact is not None:
        return rows + _compact_rows(job, job.compact)

    numels = [shape.numel() for shape in job.stepped.values()]
    if not job.in_backward:
        trained = sum(model.get_parameter(name).numel() for name in job.stepped)
        gradients, note = sum(numels), f"of {_count(trained)} entries"
    elif job.mesh.data > 1:
        gradients, note = math.ceil(job.unit / job.mesh.data), "optimizer_in_bwd: of one layer at a time"
    else:
        gradients, note = max(numels, default=0), "optimizer_in_bwd: of the largest tensor alone"
    rows.append(job.lasting("gradients", e * gradients, note))

    component, options, note = job.optimizer
    states = optimizer_state_bytes(component, options, job.stepped.values(), job.dtype)
    rows.append(job.lasting("optimizer states", states, note))
    rows.append(_mask_row(job))
    return rows


def _compact_rows(job: _Job, compact: CompactBytes) -> list[Row]:
    turns = f"the most of {compact.turns} turns" if compact.turns > 1 else "all of them at once"
    rows = [
        job.lasting("gradients", compact.gradients, f"of {_count(compact.selected)} selected entries, and dense ones"),
        job.lasting("due gradients", compact.whole, f"whole until the step, of {_count(compact.due)} entries: {turns}"),
        job.lasting("optimizer states", compact.states, "CompactAdamW: moments and ages of selected entries"),
        job.lasting("gradient mask", compact.places, "where they are: 2 bytes each, or 1 bit an entry"),
    ]
    if job.mesh.data * job.mesh.tensor == 1:
        return rows
    return [replace(row, exact=False) for row in rows]  # which device holds how many selected entries, training decides


def _mask_row(job: _Job) -> Row:
    section = job.cfg.get("gradient_mask", None)
    if section is None:
        return Row("gradient mask", 0, note="none: plain full fine-tuning", exact=True)
    if section.get("refresh_every", 1) == 1 or section.get("score", "magnitude") == "random":
        return Row("gradient mask", 0, note="nothing is kept between steps", exact=True)
    dense = _matching(job.stepped, section.get("dense", None) or ())
    masked = [shape.numel() for name, shape in job.stepped.items() if name not in dense]
    return job.lasting("gradient mask", mask_bits_bytes(masked), "1 bit an entry, kept between refreshes")


def _activation_rows(job: _Job) -> list[Row]:
    cfg, e, tensor = job.cfg, job.dtype.itemsize, job.mesh.tensor
    rows_of_sample = 2 if job.has_reference else 1  # chosen and rejected together
    shape = act.shape_of(job.model, rows_of_sample * cfg.batch_size, _seq_len(cfg, job.model)[0], e)
    if shape is None:
        return [Row("activations", 0, note=f"not estimated for a {type(job.model).__name__}")]
    kept, kept_on_host, note = _kept_activations(cfg, shape, tensor)
    largest = max((s.numel() for s in job.stepped.values()), default=0)
    component, options, _ = job.optimizer
    at_once = largest if job.in_backward else sum(s.numel() for s in job.stepped.values())
    if job.compact is not None:  # whole gradients are gone in the update
        step = max(job.compact.selecting + MASK_SCRATCH, job.compact.updating - job.compact.whole)
    else:
        step = step_scratch_bytes(component, options, largest, job.dtype, at_once)
        if cfg.get("gradient_mask", None) is not None:
            step = max(step, largest * e // 16 + MASK_SCRATCH)
    if job.offloaded:
        step = 0  # on the host
    elif not job.in_backward:
        step = max(0, step - kept)  # by then the activations are gone
    # Before it is added to the one that is there. Under FSDP2 "gathered layers" has it.
    new_gradient = e * largest if job.mesh.data == 1 else 0
    head_gradient = e * _trained_head(job)
    loss, chunks = _loss(cfg)
    if inspect.isclass(loss) and issubclass(loss, LinearCrossEntropyLoss):
        heads = {"loss and gradient of the output layer": act.linear_head_bytes(shape, chunks, head_gradient // e)}
    elif chunks:
        heads = {
            "logits and loss": act.head_bytes(shape, chunks),
            "backward of loss and output layer": act.head_backward_bytes(shape, chunks, head_gradient // e),
        }
    else:
        heads = {"logits and loss": act.head_bytes(shape, 0, pairs=job.has_reference) + new_gradient}
    # One parameter for embeddings and output layer: the gradient from the one waits for that from the other, at the end
    # of backward, and their sum lies beside both
    tied = head_gradient if "output.weight" not in job.shapes else 0
    phases = {
        **heads,
        "gradient of the largest tensor": new_gradient,
        "gradients of the tied embeddings": max(0, 3 * tied - kept),  # the activations are gone
        "recomputing a layer": act.layer_bytes(shape, tensor) + act.layer_scratch_bytes(shape, tensor) + tied,
        "optimizer step": step,
    }
    phase = max(phases, key=lambda name: phases[name])
    return [
        Row("activations", kept, kept_on_host, note=note),
        Row("working memory", phases[phase], note=f"{phase}, the most of what follows one another"),
    ]


def _trained_head(job: _Job) -> int:
    """Entries of the output layer's weight that get a gradient here; under FSDP2, "gathered layers" counts them."""
    own = "output.weight" if "output.weight" in job.shapes else "tok_embeddings.weight"  # tied
    return job.stepped[own].numel() if own in job.stepped and job.mesh.data == 1 else 0


def _kept_activations(cfg: DictConfig, shape: act.Shape, tensor_parallel: int) -> tuple[int, int, str]:
    """Bytes kept for backward on the device and on the host, and how that comes about."""
    layers, mode = shape.num_layers, cfg.get("ac_mode", None)
    checkpointed = layers if cfg.get("enable_activation_checkpointing", False) or mode == "full" else 0
    note = "activation checkpointing keeps each layer's input"
    if not checkpointed and mode == "selective" and str(cfg.get("ac_option", "")).isdigit():
        checkpointed = layers // int(cfg.ac_option)
        note = f"selective checkpointing of {checkpointed} of {layers} layers"
    if not checkpointed:
        note = "all layers, without activation checkpointing"
    whole = (layers - checkpointed) * act.layer_bytes(shape, tensor_parallel)
    inputs = checkpointed * act.layer_input_bytes(shape)
    if not cfg.get("enable_activation_offloading", False):
        return whole + inputs, 0, note
    stash = min(act.OFFLOAD_STASH, checkpointed) * act.layer_input_bytes(shape)
    return whole + stash, inputs, f"{note}, offloaded to the host but for {act.OFFLOAD_STASH}"


def _sharding_rows(job: _Job) -> list[Row]:
    if job.mesh.data == 1:
        return []
    if job.cfg.get("fsdp_reshard_after_forward", True):
        entries, note = 4 * job.unit + 2 * job.rest, "weights and gradients of two layers"
        if job.rest > job.unit // 10:
            note += " and of the embeddings, which custom_sharded_layers does not name"
    else:
        entries = sum(shape.numel() for shape in job.gathered.values()) + 2 * job.unit
        note = "all weights (fsdp_reshard_after_forward: False), gradients of two layers"
    return [Row("gathered layers", job.dtype.itemsize * entries, note=note)]


def _assumptions(job: _Job) -> list[str]:
    length, assumed = _seq_len(job.cfg, job.model)
    source = "assumed, for tokenizer.max_seq_len is null" if assumed else "tokenizer.max_seq_len"
    rows = "pairs of sequences" if job.has_reference else "sequences"
    lines = [f"{job.cfg.batch_size} {rows} of {length} tokens in a micro-batch ({source})"]
    if job.cfg.get("compile", False):
        lines.append("compile: True needs less than this estimate, which is made without it")
    return lines


def _count(entries: int) -> str:
    return f"{entries / 1e9:.2f} B" if entries >= 1e9 else f"{entries / 1e6:.1f} M"


# ---------------------------------------------------------------------------- reading the config

# A config is code: its components are called with its keys. An estimate is often asked for a config that somebody else
# wrote, so what it calls is checked to be what the section is for; components of packages that we do not know are not
# even imported, but for the model, which nothing else can count.


def _mesh(cfg, world_size: int) -> Mesh:
    tensor = cfg.get("tensor_parallel_dim", 1) or 1
    if world_size % tensor:
        raise UserError(
            f"tensor_parallel_dim {tensor} does not divide {world_size} devices: set --world-size to a multiple of it"
        )
    if tensor > 1 and cfg.get("tensor_parallel_plan", None) is None:
        raise UserError(f"tensor_parallel_dim is {tensor}, but tensor_parallel_plan is missing: add the section")
    return Mesh(data=world_size // tensor, tensor=tensor)


def _meta_model(cfg: DictConfig, dtype: torch.dtype) -> nn.Module:
    path = component_path("model", cfg.model)
    if not _makes_module(import_component("model._component_", path)):
        raise UserError(
            f"model._component_ {path} is called by gmt-tune memory only if it is a class of torch.nn.Module, or a "
            "function whose return annotation is one: add -> TransformerDecoder to your builder"
        )
    try:
        with training.set_default_dtype(dtype), torch.device("meta"):
            return config.instantiate(cfg.model)
    except Exception as error:  # anything a builder may raise
        raise UserError(f"model cannot be built ({one_line(error)}): check the section model") from None


def _makes_module(component: Any) -> bool:
    """Whether calling a component gives a model, as far as its class or its annotation says."""
    function = component.func if isinstance(component, functools.partial) else component
    try:
        made = function if inspect.isclass(function) else get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):  # it is no function, or its annotations cannot be read
        return False
    return inspect.isclass(made) and issubclass(made, nn.Module)


def _tensor_parallel_plan(cfg: DictConfig) -> dict:
    path = component_path("tensor_parallel_plan", cfg.tensor_parallel_plan)
    plan = import_component("tensor_parallel_plan._component_", path) if is_known_package(path) else None
    if not str(getattr(plan, "__module__", "")).startswith("torchtune.models."):
        raise UserError(
            f"tensor_parallel_plan._component_ {path} is none of torchtune's plans, which gmt-tune memory knows: take "
            "torchtune.models.llama3.base_llama_tp_plan for the estimate"
        )
    return config.instantiate(cfg.tensor_parallel_plan)


def _loss(cfg: DictConfig) -> tuple[Any, int]:
    """The class of the loss, if it can be known, and the pieces in which it takes the logits; 0 for all at once."""
    section = cfg.get("loss", None)
    if section is None:
        return None, 0
    path = component_path("loss", section)
    loss = import_component("loss._component_", path) if is_known_package(path) else None
    parameters = inspect.signature(loss).parameters if inspect.isclass(loss) else {}
    key = next((key for key in ("num_output_chunks", "num_chunks") if key in section or key in parameters), None)
    if key is None:
        return loss, 0
    chunks = section.get(key, parameters[key].default if key in parameters else 0)
    if not isinstance(chunks, int):
        raise UserError(f"loss.{key} must be a whole number, got {chunks!r}")
    return loss, chunks


def _compact(
    cfg: DictConfig,
    model: nn.Module,
    optimizer: tuple[type, dict, str],
    stepped: dict[str, torch.Size],
    dtype: torch.dtype,
) -> CompactBytes | None:
    """What CompactAdamW will hold; None with another optimizer."""
    component, options, _ = optimizer
    if not issubclass(component, CompactAdamW):
        return None
    section = cfg.get("gradient_mask", None)
    if section is None:
        raise UserError(
            "optimizer._component_ gmt_tune.CompactAdamW updates what a gradient_mask selects, and there is none: add "
            "the section"
        )
    if section.get("density", None) is None:  # a mask of another package may do without
        raise UserError("gradient_mask.density is missing: without it the memory of CompactAdamW cannot be estimated")
    dense = _matching(stepped, section.get("dense", None) or ())
    numels = {name: model.get_parameter(name).numel() for name in stepped}
    masked = stepped.keys() - dense
    return compact_bytes(options, numels, stepped, masked, section.density, section.get("refresh_every", 1), dtype)


def _optimizer(cfg: DictConfig) -> tuple[type, dict, str]:
    """Class and options of the optimizer, and its name with what is assumed."""
    path = component_path("optimizer", cfg.optimizer)
    if not is_known_package(path):
        return torch.optim.AdamW, {}, f"{path}, counted as torch.optim.AdamW"
    component = import_component("optimizer._component_", path)
    if not (inspect.isclass(component) and issubclass(component, torch.optim.Optimizer)):
        raise UserError(f"optimizer._component_ {path} is no optimizer: set it to one such as torch.optim.AdamW")
    options = OmegaConf.to_container(cfg.optimizer, resolve=True)
    return component, {key: value for key, value in options.items() if key != "_component_"}, component.__name__


def _apply_mask_patterns(cfg: DictConfig, model: nn.Module) -> list[str]:
    """Freeze what the mask freezes; returns the names of the parameters that are trained."""
    section = cfg.get("gradient_mask", None)
    path = section.get("_component_", None) if OmegaConf.is_dict(section) else None
    if isinstance(path, str) and not is_known_package(path):  # a class of the user's: its patterns are in the config
        for name in _matching([name for name, _ in model.named_parameters()], section.get("frozen", None) or ()):
            model.get_parameter(name).requires_grad_(False)
    else:
        mask = GradientMask if path is None else import_component("gradient_mask._component_", path)
        if not (inspect.isclass(mask) and issubclass(mask, GradientMask)):
            raise UserError(f"gradient_mask._component_ {path} is no GradientMask: set it to gmt_tune.GradientMask")
        build_gradient_mask(section, model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _matching(names, patterns) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _seq_len(cfg: DictConfig, model: nn.Module) -> tuple[int, bool]:
    """Tokens of a sequence, and whether that is assumed."""
    tokenizer = cfg.get("tokenizer", None)
    configured = tokenizer.get("max_seq_len", None) if tokenizer is not None else None
    if configured is not None:
        if not isinstance(configured, int):
            raise UserError(f"tokenizer.max_seq_len must be a whole number or null, got {configured!r}")
        return configured, False
    return min(ASSUMED_SEQ_LEN, getattr(model, "max_seq_len", ASSUMED_SEQ_LEN)), True


def sequence_length(cfg: DictConfig) -> int:
    """Tokens of a full row of a config's data."""
    return _seq_len(cfg, _meta_model(cfg, torch.bfloat16))[0]


def _rope_bytes(model: nn.Module) -> int:
    """Rotary tables, which recipes compute on the device in fp32: a cosine and a sine for each position and pair."""
    ropes = [m for m in model.modules() if hasattr(m, "rope_init")]
    return sum(4 * getattr(m, "max_seq_len", 0) * getattr(m, "dim", 0) for m in ropes)
