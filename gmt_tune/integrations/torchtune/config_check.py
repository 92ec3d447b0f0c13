"""Refuses a wrong config before a model is loaded: one sentence with the key, the value, and what is right."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torchtune import config, utils

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.config.mask import build_gradient_mask
from gmt_tune.integrations.torchtune.config_components import (
    check_component,
    check_metric_logger,
    import_component,
    is_number,
    meant,
    nearest,
    try_optimizer,
)
from gmt_tune.integrations.torchtune.config_files import check_files

log = utils.get_logger("INFO")

_REQUIRED = (
    "output_dir", "model", "tokenizer", "dataset", "checkpointer", "optimizer", "loss", "metric_logger", "seed",
    "shuffle", "batch_size", "epochs", "max_steps_per_epoch", "gradient_accumulation_steps", "device", "dtype",
    "resume_from_checkpoint",
)  # fmt: skip
_OPTIONAL = (
    "gradient_mask", "evaluation", "lr_scheduler", "optimizer_in_bwd", "clip_grad_norm", "compile", "collate_fn",
    "enable_activation_checkpointing", "enable_activation_offloading", "ac_mode", "ac_option",
    "custom_sharded_layers", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "enable_async_checkpointing",
    "tensor_parallel_dim", "tensor_parallel_plan", "cudnn_deterministic_mode", "log_every_n_steps",
    "log_peak_memory_stats", "log_level", "profiler", "save_every_n_steps", "keep_last_n_checkpoints",
    "dataset_val", "run_val_every_n_steps", "batch_size_val", "on_nonfinite", "track_selection_every_n_steps",
    "write_report",
)  # fmt: skip

KEYS = (*_REQUIRED, *_OPTIONAL)

# What other trainers call a key, where the names are not alike.
_SYNONYMS = {
    "grad_clip": "clip_grad_norm",
    "learning_rate": "optimizer.lr",
    "on_nan": "on_nonfinite",
    "precision": "dtype",
    "random_seed": "seed",
    "resume": "resume_from_checkpoint",
    "tp_dim": "tensor_parallel_dim",
    "warmup_steps": "lr_scheduler.num_warmup_steps",
}

# How a variable of the user's often ends; no optional key does.
_VARIABLE_ENDS = ("_dir", "_name", "_path", "_root")

# Begins a flag of a config that marks one of its keys.
_IS_NEW = "gmt_tune_new_key:"

_WHOLE = "a whole number from 1 on"
_BOOLS = (
    "shuffle", "resume_from_checkpoint", "optimizer_in_bwd", "compile", "enable_activation_checkpointing",
    "enable_activation_offloading", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "log_peak_memory_stats",
    "write_report", "enable_async_checkpointing",
)  # fmt: skip
_COUNTS = ("batch_size", "epochs", "gradient_accumulation_steps", "tensor_parallel_dim", "log_every_n_steps")
_COUNTS_OR_NULL = (
    "max_steps_per_epoch", "save_every_n_steps", "keep_last_n_checkpoints", "run_val_every_n_steps", "batch_size_val",
    "track_selection_every_n_steps",
)  # fmt: skip
_CHOICES = {"dtype": ("bf16", "fp32"), "on_nonfinite": ("error", "skip")}
_CHOICES_OR_NULL = {
    "ac_mode": ("full", "selective"),
    "cudnn_deterministic_mode": ("default", "warn", "error", 0, 1, 2),
}

# What a component is called with besides the config's keys: number of positional arguments, and names.
_GIVEN = {
    "tokenizer": (0, ()),
    "dataset": (1, ()),
    "dataset_val": (1, ()),
    "optimizer": (1, ()),
    "lr_scheduler": (1, ("num_training_steps", "last_epoch")),
    "loss": (0, ()),
    "metric_logger": (0, ()),
    "model": (0, ()),
    "checkpointer": (0, ("should_load_recipe_state",)),
    "ref_checkpointer": (0, ("should_load_recipe_state",)),
    "evaluation": (1, ()),
    "tensor_parallel_plan": (0, ()),
}


def check_config(cfg: DictConfig, own_keys: Sequence[str] = ()) -> None:
    """Check keys, values, and the files that a config names. Reads no weights and imports no data.

    Args:
        cfg: the parsed config.
        own_keys: top-level keys that a customised recipe reads besides those known here; it checks them itself.

    Raises:
        UserError: for the first thing that is wrong.
    """
    check_keys(cfg, own_keys)
    try_optimizer(cfg.optimizer, cfg.get("lr_scheduler", None))
    check_metric_logger(cfg.metric_logger)
    if cfg.get("collate_fn", None) is not None:
        import_component("collate_fn", cfg.collate_fn)
    model = _meta_model(cfg)
    if hasattr(getattr(model, "output", None), "tied_module") and "tok_embeddings" in (
        cfg.get("custom_sharded_layers", None) or ()
    ):
        raise UserError(
            "custom_sharded_layers must not name tok_embeddings for this model, whose output layer uses their weights "
            "too: take it out of the list, or set custom_sharded_layers: null"
        )
    _check_lengths(cfg, model)
    check_files(cfg, model)
    build_gradient_mask(cfg.get("gradient_mask", None), model)


def check_keys(cfg: DictConfig, own_keys: Sequence[str] = (), *, only_known: bool = False) -> None:
    """Check keys and values. Calls nothing that the config names, and looks at no files.

    Args:
        cfg: the parsed config.
        own_keys: as in :func:`check_config`.
        only_known: import no component of a package that we do not know; its keys are not checked then.

    Raises:
        UserError: for the first thing that is wrong.
    """
    _check_interpolations(cfg)
    _check_top_level_keys(cfg, own_keys)
    _check_values(cfg)
    for section, given in _GIVEN.items():
        value = cfg.get(section, None)
        for i, part in enumerate(value if isinstance(value, ListConfig) else [value]):
            name = f"{section}[{i}]" if isinstance(value, ListConfig) else section
            if part is not None:
                check_component(name, part, *given, only_known=only_known)
    _check_combinations(cfg)


def check_machine(cfg: DictConfig) -> None:
    """Check what a config needs of the machine that it is to run on.

    Raises:
        UserError: if the device is not there, or the processes cannot be split as the config says.
    """
    kind, _, index = str(cfg.device).partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"device is {cfg.device}, but torch {torch.__version__} sees no CUDA device here: set device: cpu, or "
                "install a driver and a torch build that fit the card (nvidia-smi shows it)"
            )
        local_rank = process_group.local_rank()
        if index and local_rank is not None and index != local_rank:
            raise UserError(
                f"device is {cfg.device}, but under torchrun each process takes the device of its own rank, here "
                f"{local_rank}: set device: cuda, and CUDA_VISIBLE_DEVICES to choose cards"
            )
        wanted = int(index or local_rank or 0)
        if wanted >= torch.cuda.device_count():
            raise UserError(
                f"CUDA device {wanted} is asked for, but there are {torch.cuda.device_count()} (counted from 0): set "
                "device to one of them, or start as many processes as there are (--nproc_per_node)"
            )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    split = cfg.get("tensor_parallel_dim", 1)
    if world_size % split:
        raise UserError(f"tensor_parallel_dim must divide the number of processes, {world_size}, got {split}")


def _check_interpolations(cfg: DictConfig) -> None:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = (error.msg or one_line(error)).partition("\n")[0]  # its further lines repeat the key
        raise UserError(f"{error.full_key or 'the config'} cannot be resolved: {reason}") from None
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def _check_top_level_keys(cfg: DictConfig, own_keys: Sequence[str]) -> None:
    for key in _REQUIRED:
        if key not in cfg:
            raise UserError(f"{key} is missing in the config: `tune cat quickstart` shows a complete one")
        if key in _GIVEN and cfg[key] is None:
            raise UserError(f"{key} is null, but every run needs this section: `tune cat quickstart` has one")
    known = (*KEYS, *own_keys)
    raw = OmegaConf.to_yaml(cfg)
    for key, value in cfg.items():
        if key in known or refers_to(raw, str(key)):  # a key that others refer to is a user's variable
            continue
        if key == "ref_checkpointer" and value is not None:
            raise UserError(f"{key} is no key of this recipe: tune run gmt_full_dpo is the one for this config")
        right = _meant_key(str(key), known, cfg)
        is_new = cfg._get_flag(f"{_IS_NEW}{key}")
        if is_new or not _is_plain(value) or right in known and not _may_be_variable(str(key), right):
            where = " on the command line" if is_new else ""
            hint = f"did you mean {right}?" if right is not None else nearest(str(key), known)
            raise UserError(f"{key} ({value!r}){where} is no key of this recipe: {hint}")
        if value is not None and os.environ.get("RANK", "0") == "0":
            hint = "." if right is None or right in known else f": did you mean {right}?"
            log.warning(f"{key} has no effect: it is no key of this recipe, and no value refers to it{hint}")


def _may_be_variable(key: str, right: str) -> bool:
    """Whether a plain value with a name like that of a known key may be a variable of the user's all the same."""
    return key.endswith(_VARIABLE_ENDS) or right in _GIVEN and right in _REQUIRED  # the section itself is there


def mark_new(cfg: DictConfig, keys: Sequence[str]) -> None:
    """Remember that a config's file lacks these top-level keys, so that they are no variables of its author."""
    cfg._set_flag([_IS_NEW + key for key in keys], True)


def _meant_key(key: str, known: Sequence[str], cfg: DictConfig) -> str | None:
    """The known key, or the key of a section, that a top-level key may be meant to be; None if it is like none."""
    if key in _SYNONYMS:
        return _SYNONYMS[key]
    inner = {str(name): section for section in cfg if OmegaConf.is_dict(cfg[section]) for name in cfg[section]}
    right = None if key in inner else meant(key, known)
    in_section = meant(key, list(inner)) if right is None else None
    return right if in_section is None else f"{inner[in_section]}.{in_section}"


def refers_to(raw: str, key: str) -> bool:
    """Whether a value of the config's text refers to a top-level key: ``${key}``, ``${key.inner}``, ``${key[0]}``."""
    return re.search(rf"\$\{{\s*\.*{re.escape(key)}\s*[.\[}}]", raw) is not None


def _is_plain(value: object) -> bool:
    """Whether it is a text, a number, a truth value, null, or a list of such."""
    return not OmegaConf.is_config(value) or isinstance(value, ListConfig) and all(map(_is_plain, value))


def _check_values(cfg: DictConfig) -> None:
    for key in _BOOLS:
        if not isinstance(cfg.get(key, False), (bool, type(None))):
            raise UserError(f"{key} must be True or False, got {cfg.get(key)!r}")
    for key in _COUNTS:
        _check_count(key, cfg.get(key, 1))
    for key in _COUNTS_OR_NULL:
        if cfg.get(key, None) is not None:
            _check_count(key, cfg.get(key), " or null")
    for key, choices in _CHOICES.items():
        if cfg.get(key, choices[0]) not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, got {cfg.get(key)!r}")
    for key, choices in _CHOICES_OR_NULL.items():
        if cfg.get(key, None) not in (None, *choices):
            raise UserError(f"{key} must be one of {', '.join(map(str, choices))}, or null, got {cfg.get(key)!r}")
    clip = cfg.get("clip_grad_norm", None)
    if clip is not None and not (is_number(clip) and clip > 0) and clip != "inf":
        raise UserError(f"clip_grad_norm must be a positive number, 'inf' to only log the norm, or null, got {clip!r}")
    if cfg.seed is not None and (
        isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32
    ):
        raise UserError(
            f"seed must be a whole number from 0 to {2**32 - 1}, or null for a random one, got {cfg.seed!r}"
        )
    kind, _, index = str(cfg.device).partition(":")
    if kind not in ("cpu", "cuda", "xpu", "npu") or (index and not index.isdigit()):
        raise UserError(f"device must be cuda, cpu, xpu or npu, got {cfg.device!r}")


def _check_count(key: str, value: object, or_null: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key} must be {_WHOLE}{or_null}, got {value!r}")


def _check_combinations(cfg: DictConfig) -> None:
    if cfg.get("optimizer_in_bwd", False):
        if cfg.get("fsdp_cpu_offload", False) and _torch_release() < (2, 13):
            raise UserError(
                f"optimizer_in_bwd: True does not work with fsdp_cpu_offload: True on torch {torch.__version__}, which "
                "steps before gradients have arrived in the host's memory: set one of them to False, or install torch "
                "2.13 or newer"
            )
        if cfg.gradient_accumulation_steps > 1:
            raise UserError(
                f"optimizer_in_bwd: True needs gradient_accumulation_steps: 1, got {cfg.gradient_accumulation_steps}"
            )
        if cfg.get("clip_grad_norm", None) is not None:
            raise UserError(f"optimizer_in_bwd: True needs clip_grad_norm: null, got {cfg.clip_grad_norm}")
        if (cfg.get("gradient_mask", None) or {}).get("scope", None) == "global":
            raise UserError(
                "gradient_mask.scope: global needs all gradients together, and optimizer_in_bwd: True has one at a "
                "time: set gradient_mask.scope: tensor, or optimizer_in_bwd: False"
            )
        if cfg.get("on_nonfinite", "error") == "skip":
            raise UserError(
                "optimizer_in_bwd: True needs on_nonfinite: error: it changes weights before all gradients are there, "
                "so no step can be left out"
            )
    if cfg.get("tensor_parallel_dim", 1) > 1:
        if cfg.get("tensor_parallel_plan", None) is None:
            raise UserError(
                f"tensor_parallel_dim: {cfg.tensor_parallel_dim} needs tensor_parallel_plan: set its _component_ to "
                "torchtune.models.llama3.base_llama_tp_plan"
            )
        if cfg.optimizer.get("fused", False):
            raise UserError("optimizer.fused: True does not work with tensor_parallel_dim above 1: set it to False")
    if cfg.get("gradient_mask", None) is not None and cfg.optimizer._component_.endswith("CPUOffloadOptimizer"):
        raise UserError(
            "optimizer._component_: CPUOffloadOptimizer moves gradients to the host before they can be masked: "
            "to save memory, use torchao.optim.AdamW8bit or AdamW4bit, or several devices with fsdp_cpu_offload: True"
        )
    if cfg.get("enable_activation_offloading", False):
        if str(cfg.device).split(":")[0] != "cuda":
            raise UserError(f"enable_activation_offloading: True needs device: cuda, got {cfg.device!r}")
        if not cfg.get("enable_activation_checkpointing", False):
            raise UserError("enable_activation_offloading: True needs enable_activation_checkpointing: True")
    # A section that is null was left out on purpose: what goes with it has no effect
    if cfg.get("run_val_every_n_steps", None) is not None and "dataset_val" not in cfg:
        raise UserError("run_val_every_n_steps is set, but dataset_val is not: add the section dataset_val")
    if cfg.get("track_selection_every_n_steps", None) is not None and "gradient_mask" not in cfg:
        raise UserError(
            f"track_selection_every_n_steps is {cfg.track_selection_every_n_steps}, but there is no gradient_mask "
            "whose selection could be tracked: add the section gradient_mask, or set it to null"
        )
    if "left_pad_sequence" in str(cfg.get("collate_fn", "")):
        raise UserError("collate_fn must not be left_pad_sequence, which is for inference only")


def _torch_release() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def _meta_model(cfg: DictConfig) -> nn.Module:
    """The model that the config builds, without memory for its weights."""
    try:
        with torch.device("meta"):
            return config.instantiate(cfg.model)
    except Exception as error:
        raise UserError(f"model ({cfg.model._component_}) cannot be built: {one_line(error)}") from None


def _check_lengths(cfg: DictConfig, model: nn.Module) -> None:
    rows, fits = cfg.tokenizer.get("max_seq_len", None), getattr(model, "max_seq_len", None)
    if is_number(rows) and is_number(fits) and rows > fits:
        raise UserError(
            f"tokenizer.max_seq_len is {rows}, but the model takes at most {fits} tokens: lower it, or raise "
            "model.max_seq_len"
        )
