"""From a config to the memory that each device needs, row by row.

The model is built on the meta device, so that a 70B model costs no memory here and needs no file. What is there at the
same time is added up; of the moments of a step, which ``moments`` lists, the largest counts.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config, training

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.checkpoint.space import host_bytes_of_save
from gmt_tune.integrations.torchtune.config.check import check_mask, check_model, check_optimizer
from gmt_tune.integrations.torchtune.config.components import (
    component_path,
    import_component,
    is_known_package,
    try_optimizer,
)
from gmt_tune.integrations.torchtune.config.mask import build_gradient_mask
from gmt_tune.masking import GradientMask
from gmt_tune.masking.parameters import DEFAULT_DENSE
from gmt_tune.memory import activations as act
from gmt_tune.memory.compact import CompactBytes, compact_bytes
from gmt_tune.memory.moments import Activations, Job, Moment, activations, moments
from gmt_tune.memory.sharding import Mesh, gathered_units, local_shapes
from gmt_tune.memory.states import mask_bits_bytes, optimizer_state_bytes
from gmt_tune.optim import CompactAdamW

GIB = 2**30
ASSUMED_SEQ_LEN = 2048
RESERVE = GIB  # CUDA context, kernels and library workspaces, and what the allocator cannot use
RESERVE_NCCL = GIB


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
    """The memory of one device, of ``world_size`` equal ones.

    Attributes:
        save_host_bytes: of the host's memory, that a save takes for a while in the process that takes most.
    """

    world_size: int
    device: str
    rows: list[Row]
    assumptions: list[str]
    save_host_bytes: int

    @property
    def device_bytes(self) -> int:
        return sum(row.device_bytes for row in self.rows)

    @property
    def host_bytes(self) -> int:
        return sum(row.host_bytes for row in self.rows)


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
    _check(cfg, model)
    trainable = _apply_mask_patterns(cfg, model)
    plan = _tensor_parallel_plan(cfg) if mesh.tensor > 1 else None
    shapes = local_shapes(model, mesh, plan)
    gathered = local_shapes(model, Mesh(tensor=mesh.tensor), plan)
    separately = tuple(cfg.get("custom_sharded_layers", None) or ())
    units = gathered_units(separately, gathered) if mesh.data > 1 else {}
    stepped = {name: shapes[name] for name in trainable}
    optimizer = _optimizer(cfg)
    compact = _compact(cfg, model, optimizer, stepped, dtype)
    job = Job(cfg, model, dtype, mesh, shapes, stepped, gathered, units, optimizer, compact, _loss(cfg))
    rows_of_sample = 2 if job.has_reference else 1  # chosen and rejected together
    passing, reason = None, ""
    try:
        passing = activations(job, rows_of_sample * cfg.batch_size, _seq_len(cfg, model)[0])
    except act.NotRun as error:
        reason = str(error)
    most = max(moments(job, passing), key=lambda moment: moment.total)
    nccl = RESERVE_NCCL if world_size > 1 else 0
    note = "CUDA context, workspaces, fragmentation" + (", NCCL buffers" if nccl else "")
    rows = [
        *_state_rows(job, most),
        *_passing_rows(job, most, passing, reason),
        Row("reserve", RESERVE + nccl, note=note),
    ]
    device = str(cfg.get("device", "cuda"))
    save = _save_host_bytes(job, rows, world_size, on_host=job.is_offloaded or device.startswith("cpu"))
    return Estimate(world_size, device, rows, _assumptions(job), save)


def _save_host_bytes(job: Job, rows: list[Row], world_size: int, *, on_host: bool) -> int:
    e, parameters = job.dtype.itemsize, list(job.model.parameters())
    states = sum(r.device_bytes + r.host_bytes for r in rows if r.name in ("optimizer states", "gradient mask"))
    return host_bytes_of_save(
        weights=e * sum(p.numel() for p in parameters),
        largest_weight=e * max(p.numel() for p in parameters),
        state=states,
        largest_state=min(states, e * job.largest),
        processes=world_size,
        is_async=bool(job.cfg.get("enable_async_checkpointing", False)),
        on_host=on_host,
    )


def _lasting(job: Job, name: str, count: int, note: str) -> Row:
    """A row of tensors that last: in the host's memory with ``fsdp_cpu_offload``."""
    if job.is_offloaded:
        return Row(name, 0, count, note + "; fsdp_cpu_offload: on the host", exact=True)
    return Row(name, count, note=note, exact=True)


def _state_rows(job: Job, most: Moment) -> list[Row]:
    e, model = job.dtype.itemsize, job.model
    weights = e * sum(shape.numel() for shape in job.shapes.values())
    total = sum(p.numel() for p in model.parameters())
    row = _lasting(job, "weights", weights, f"{_count(total)} parameters in {job.cfg.dtype}")
    if rope := _rope_bytes(model):  # on the device in any case
        row = replace(row, device_bytes=row.device_bytes + rope, note=row.note + ", rotary tables")
    rows = [row]
    if job.has_reference:
        rows.append(_lasting(job, "reference model", weights, "its weights alone"))
    if job.compact is not None:
        return rows + _compact_rows(job, job.compact, most)

    note = f"of {_count(sum(model.get_parameter(name).numel() for name in job.stepped))} entries"
    if job.in_backward:
        note = "optimizer_in_bwd: of " + ("one layer at a time" if job.mesh.data > 1 else "the largest tensor alone")
    gradients = _lasting(job, "gradients", job.gradients, note)
    if most.gradients < gradients.device_bytes:
        note = f"{note}, as far as they are there: {most.name}"
        gradients = replace(gradients, device_bytes=most.gradients, note=note, exact=False)
    rows.append(gradients)

    component, options, note = job.optimizer
    states = optimizer_state_bytes(component, options, job.stepped.values(), job.dtype)
    rows.append(_lasting(job, "optimizer states", states, note))
    rows.append(_mask_row(job))
    return rows


def _compact_rows(job: Job, compact: CompactBytes, most: Moment) -> list[Row]:
    turns = f"the most of {compact.turns} turns" if compact.turns > 1 else "all of them at once"
    rows = [
        _lasting(
            job, "gradients", compact.gradients, f"of {_count(compact.selected)} selected entries, and dense ones"
        ),
        _lasting(
            job, "due gradients", compact.whole, f"whole until the step, of {_count(compact.due)} entries: {turns}"
        ),
    ]
    if not most.gradients:
        rows = [replace(row, device_bytes=0, note=f"{row.note}; none yet: {most.name}") for row in rows]
    rows += [
        _lasting(job, "optimizer states", compact.states, "CompactAdamW: moments and ages of selected entries"),
        _lasting(job, "gradient mask", compact.places, "where they are: 2 bytes each, or 1 bit an entry"),
    ]
    if job.mesh.data * job.mesh.tensor == 1:
        return rows
    return [replace(row, exact=False) for row in rows]  # which device holds how many selected entries, training decides


def _mask_row(job: Job) -> Row:
    section = job.cfg.get("gradient_mask", None)
    if section is None:
        return Row("gradient mask", 0, note="none: plain full fine-tuning", exact=True)
    own = _own_mask(job.cfg)
    keeps = section.get("refresh_every", 1) != 1 and section.get("score", "magnitude") != "random"
    if not keeps and own is None:
        return Row("gradient mask", 0, note="nothing is kept between steps", exact=True)
    dense = _matching(job.stepped, section.get("dense", DEFAULT_DENSE) or ())
    masked = [shape.numel() for name, shape in job.stepped.items() if name not in dense]
    note = "1 bit an entry, kept between refreshes" if keeps else f"1 bit an entry, needed if {own} overrides refreshes"
    return replace(_lasting(job, "gradient mask", mask_bits_bytes(masked), note), exact=keeps)


def _passing_rows(job: Job, most: Moment, passing: Activations | None, reason: str) -> list[Row]:
    """What comes and goes in a step, at the moment when most is there; ``reason``: why nothing is known of it."""
    if passing is None:
        return [
            Row("activations", 0, note=f"not estimated: {reason}"),
            Row("working memory", most.working, note=f"{most.name}; of all else, nothing is known"),
        ]
    rows = [
        Row("activations", most.activations, passing.on_host, note=passing.note),
        Row("working memory", most.working, note=f"{most.name}, the most of what follows one another"),
    ]
    if job.mesh.data > 1:
        note = "whole weights and gradients of layers"
        if job.units.get("", 0) > job.layer // 10:
            note += " and of the embeddings, which custom_sharded_layers does not name"
        if not job.cfg.get("fsdp_reshard_after_forward", True):
            note = "all weights (fsdp_reshard_after_forward: False), gradients of layers"
        rows.append(Row("gathered layers", most.gathered, note=note))
    return rows


def _assumptions(job: Job) -> list[str]:
    length, assumed = _seq_len(job.cfg, job.model)
    source = "assumed, for tokenizer.max_seq_len is null" if assumed else "tokenizer.max_seq_len"
    rows = "pairs of sequences" if job.has_reference else "sequences"
    lines = [f"{job.cfg.batch_size} {rows} of {length} tokens in a micro-batch ({source})"]
    if job.cfg.get("fsdp_cpu_offload", False) and not job.is_offloaded:
        why = "the CPU" if job.on_cpu else "one device, or where each layer is split over all of them"
        lines.append(f"fsdp_cpu_offload: True has no effect on {why}: nothing is sharded that could be brought back")
    if job.compact is not None and (own := _own_mask(job.cfg)):
        lines.append(f"{own} is not imported here: tensors are taken to be due as refresh_every says")
    if job.cfg.get("compile", False):
        lines.append("compile: True needs less than this estimate, which is made without it")
    return lines


def _count(entries: int) -> str:
    return f"{entries / 1e9:.2f} B" if entries >= 1e9 else f"{entries / 1e6:.1f} M"


# ---------------------------------------------------------------------------- reading the config

# A config is code: its components are called with its keys. An estimate is often asked for a config that somebody else
# wrote, so what it calls is checked to be what the section is for; components of packages that we do not know are not
# even imported, but for the model, which nothing else can count.


def _check(cfg: DictConfig, model: nn.Module) -> None:
    """What ``tune run`` refuses of model, optimizer and mask together, as far as their components are known."""
    _optimizer(cfg)
    tried = None
    if is_known_package(cfg.optimizer._component_):
        scheduler = cfg.get("lr_scheduler", None)
        path = component_path("lr_scheduler", scheduler) if scheduler is not None else ""
        module = import_component("lr_scheduler._component_", path).__module__ if is_known_package(path) else ""
        is_schedule = str(module).startswith(("torch.optim.lr_scheduler", "torchtune.training.lr_schedulers"))
        tried = try_optimizer(cfg.optimizer, scheduler if is_schedule else None)
        check_optimizer(cfg, tried)
    check_model(cfg, model)
    path = _mask_path(cfg)
    if isinstance(path, str) and is_known_package(path):
        _gradient_mask_class(path)
        check_mask(cfg, copy.deepcopy(model), tried)  # which is left with hooks


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
            model = config.instantiate(cfg.model)
        for module in model.modules():  # recipes call it on their device: some tables can't be made without values
            if hasattr(module, "rope_init") and not hasattr(module, "cache"):
                module.rope_init()
                module.to("meta")
        return model
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
    if not str(getattr(plan, "__module__", "")).startswith(("torchtune.models.", "gmt_tune.models.")):
        raise UserError(
            f"tensor_parallel_plan._component_ {path} is none of torchtune's or gmt-tune's plans: take "
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
    dense = _matching(stepped, section.get("dense", DEFAULT_DENSE) or ())
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
    section, path = cfg.get("gradient_mask", None), _mask_path(cfg)
    if _own_mask(cfg):  # its patterns are in the config
        for name in _matching([name for name, _ in model.named_parameters()], section.get("frozen", None) or ()):
            model.get_parameter(name).requires_grad_(False)
    else:
        if path is not None:
            _gradient_mask_class(path)
        build_gradient_mask(section, model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _mask_path(cfg: DictConfig) -> Any:
    """The ``_component_`` of the mask's section, whatever it is; None without one."""
    section = cfg.get("gradient_mask", None)
    return section.get("_component_", None) if OmegaConf.is_dict(section) else None


def _own_mask(cfg: DictConfig) -> str | None:
    """The path of a mask's class of the user's, which is not imported."""
    path = _mask_path(cfg)
    return path if isinstance(path, str) and not is_known_package(path) else None


def _gradient_mask_class(path: object) -> type[GradientMask]:
    """The class of a mask, checked to be one before anything calls it."""
    mask = import_component("gradient_mask._component_", path)
    if not (inspect.isclass(mask) and issubclass(mask, GradientMask)):
        raise UserError(f"gradient_mask._component_ {path} is no GradientMask: set it to gmt_tune.GradientMask")
    return mask


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
    """Rotary tables, which recipes compute on the device."""
    tables = (getattr(m, "cache", None) for m in model.modules() if hasattr(m, "rope_init"))
    return sum(table.nbytes for table in tables if isinstance(table, torch.Tensor))
