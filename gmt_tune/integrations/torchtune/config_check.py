"""Refuses a wrong config before a model is loaded: one sentence with the key, the value, and what is right."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import nn
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.mask import build_gradient_mask

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

_WHOLE = "a whole number from 1 on"
_BOOLS = (
    "shuffle", "resume_from_checkpoint", "optimizer_in_bwd", "compile", "enable_activation_checkpointing",
    "enable_activation_offloading", "fsdp_cpu_offload", "fsdp_reshard_after_forward", "log_peak_memory_stats",
    "write_report",
)  # fmt: skip
_COUNTS = ("batch_size", "epochs", "gradient_accumulation_steps", "tensor_parallel_dim", "log_every_n_steps")
_COUNTS_OR_NULL = (
    "max_steps_per_epoch", "save_every_n_steps", "keep_last_n_checkpoints", "run_val_every_n_steps", "batch_size_val",
    "track_selection_every_n_steps",
)  # fmt: skip
_CHOICES = {"dtype": ("bf16", "fp32"), "on_nonfinite": ("error", "skip")}

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
}

# Sections that name files of a model; the second is that of a recipe with a reference model.
_CHECKPOINTERS = ("checkpointer", "ref_checkpointer")

# "model_type" of a Hugging Face config.json to the model types of torchtune's checkpointers.
_FAMILIES = {
    "llama": ("LLAMA2", "LLAMA3", "LLAMA3_2"),
    "mistral": ("MISTRAL",),
    "gemma": ("GEMMA",),
    "gemma2": ("GEMMA2",),
    "phi3": ("PHI3_MINI", "PHI4"),
    "qwen2": ("QWEN2",),
}


def check_config(cfg: DictConfig, own_keys: Sequence[str] = ()) -> None:
    """Check keys, values, and the files that a config names. Reads no weights and imports no data.

    Args:
        cfg: the parsed config.
        own_keys: top-level keys that a customised recipe reads besides those known here; it checks them itself.

    Raises:
        UserError: for the first thing that is wrong.
    """
    _check_interpolations(cfg)
    _check_top_level_keys(cfg, own_keys)
    _check_values(cfg)
    for section in _GIVEN:
        value = cfg.get(section, None)
        for i, part in enumerate(value if isinstance(value, ListConfig) else [value]):
            if part is not None:
                _check_component(f"{section}[{i}]" if isinstance(value, ListConfig) else section, section, part)
    _check_combinations(cfg)
    _check_files(cfg)
    model = _meta_model(cfg)
    for section in _CHECKPOINTERS:
        if cfg.get(section, None) is not None:
            _check_family(cfg, section, model)
    build_gradient_mask(cfg.get("gradient_mask", None), model)
    _check_output_dir(Path(cfg.output_dir))


def _check_interpolations(cfg: DictConfig) -> None:
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        raise UserError(f"{error.full_key or 'the config'} cannot be resolved: {reason}") from None
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def _check_top_level_keys(cfg: DictConfig, own_keys: Sequence[str]) -> None:
    for key in _REQUIRED:
        if key not in cfg:
            raise UserError(f"{key} is missing in the config: `tune cat quickstart` shows a complete one")
    known = (*_REQUIRED, *_OPTIONAL, *own_keys)
    raw = json.dumps(OmegaConf.to_container(cfg, resolve=False))
    for key, value in cfg.items():
        if key not in known and "${" + str(key) not in raw:  # a key that others refer to is a user's variable
            raise UserError(f"{key} ({value!r}) is no key of this recipe: {_nearest(str(key), known)}")


def _check_values(cfg: DictConfig) -> None:
    for key in _BOOLS:
        if not isinstance(cfg.get(key, False), bool):
            raise UserError(f"{key} must be True or False, got {cfg.get(key)!r}")
    for key in _COUNTS:
        _check_count(key, cfg.get(key, 1))
    for key in _COUNTS_OR_NULL:
        if cfg.get(key, None) is not None:
            _check_count(key, cfg.get(key), " or null")
    for key, choices in _CHOICES.items():
        if cfg.get(key, choices[0]) not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, got {cfg.get(key)!r}")
    clip = cfg.get("clip_grad_norm", None)
    if clip is not None and not (_is_number(clip) and clip > 0) and clip != "inf":
        raise UserError(f"clip_grad_norm must be a positive number, 'inf' to only log the norm, or null, got {clip!r}")
    if cfg.seed is not None and (isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0):
        raise UserError(f"seed must be a whole number from 0 on, or null for a random one, got {cfg.seed!r}")
    device = str(cfg.device).split(":")[0]
    if device not in ("cpu", "cuda", "xpu", "npu", "mps"):
        raise UserError(f"device must be cuda, cpu, xpu or npu, got {cfg.device!r}")


def _check_count(key: str, value: object, or_null: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key} must be {_WHOLE}{or_null}, got {value!r}")


def _check_component(name: str, section: str, cfg: DictConfig) -> None:
    if not OmegaConf.is_dict(cfg):
        raise UserError(f"{name} must be a section with _component_, got {cfg!r}")
    path = cfg.get("_component_", None)
    if not isinstance(path, str) or not path:
        raise UserError(f"{name}._component_ is missing: set it to a dotted path such as torch.optim.AdamW")
    if os.getcwd() not in os.sys.path:
        os.sys.path.append(os.getcwd())  # a user's own module in the folder of the run, as torchtune allows
    try:
        component = _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{name}._component_ '{path}' cannot be imported ({reason}): check its spelling") from None
    positional, keywords = _GIVEN[section]
    try:
        signature = inspect.signature(component)
    except ValueError:  # builtins tell nothing of their arguments
        return
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names = list(parameters)[positional:]
        for key in cfg:
            if key != "_component_" and key not in names:
                raise UserError(f"{name}.{key} ({cfg[key]!r}) is no key of {path}: {_nearest(str(key), names)}")
    try:
        given = {key: None for key in cfg if key != "_component_"} | dict.fromkeys(keywords)
        given = {k: v for k, v in given.items() if k in parameters or k not in keywords}
        signature.bind(*[None] * positional, **given)
    except TypeError as error:
        raise UserError(f"{name} ({path}): {error}") from None
    lr = cfg.get("lr", None) if section == "optimizer" else None
    if lr is not None and not (_is_number(lr) and lr >= 0):
        raise UserError(f"optimizer.lr must be a number from 0 on, such as 2e-5, got {lr!r}")


def _check_combinations(cfg: DictConfig) -> None:
    if cfg.get("optimizer_in_bwd", False):
        if cfg.gradient_accumulation_steps > 1:
            raise UserError(
                f"optimizer_in_bwd: True needs gradient_accumulation_steps: 1, got {cfg.gradient_accumulation_steps}"
            )
        if cfg.get("clip_grad_norm", None) is not None:
            raise UserError(f"optimizer_in_bwd: True needs clip_grad_norm: null, got {cfg.clip_grad_norm}")
    if cfg.get("enable_activation_offloading", False):
        if str(cfg.device).split(":")[0] != "cuda":
            raise UserError(f"enable_activation_offloading: True needs device: cuda, got {cfg.device!r}")
        if not cfg.get("enable_activation_checkpointing", False):
            raise UserError("enable_activation_offloading: True needs enable_activation_checkpointing: True")
    if cfg.get("run_val_every_n_steps", None) is not None and cfg.get("dataset_val", None) is None:
        raise UserError("run_val_every_n_steps is set, but dataset_val is not: add the section dataset_val")
    if cfg.get("track_selection_every_n_steps", None) is not None and cfg.get("gradient_mask", None) is None:
        raise UserError(
            f"track_selection_every_n_steps is {cfg.track_selection_every_n_steps}, but there is no gradient_mask "
            "whose selection could be tracked: add the section gradient_mask, or set it to null"
        )
    if "left_pad_sequence" in str(cfg.get("collate_fn", "")):
        raise UserError("collate_fn must not be left_pad_sequence, which is for inference only")


def _check_files(cfg: DictConfig) -> None:
    _check_folder("output_dir", cfg.output_dir)
    for section in _CHECKPOINTERS:
        if cfg.get(section, None) is not None:
            _check_model_files(section, cfg[section])
    for key in ("path", "merges_file"):
        path = cfg.tokenizer.get(key, None)
        if isinstance(path, str) and not Path(path).is_file():
            raise UserError(f"tokenizer.{key} {path} does not exist: name the tokenizer file of the model")
    for section in ("dataset", "dataset_val"):
        part = cfg.get(section, None)
        for one in part if isinstance(part, ListConfig) else [part]:
            data_files = one.get("data_files", None) if one is not None else None
            if isinstance(data_files, str) and not any(c in data_files for c in "*?[") and "://" not in data_files:
                if not Path(data_files).is_file():
                    raise UserError(f"{section}.data_files {data_files} does not exist: name the file with the rows")


def _check_folder(key: str, path: object) -> None:
    if not isinstance(path, str) or not path:
        raise UserError(f"{key} must be the path of a folder, got {path!r}")


def _check_model_files(section: str, checkpointer: DictConfig) -> None:
    for key in ("output_dir", "checkpoint_dir"):
        _check_folder(f"{section}.{key}", checkpointer.get(key, None))
    folder = Path(checkpointer.checkpoint_dir)
    if not folder.is_dir():
        raise UserError(
            f"{section}.checkpoint_dir {folder} does not exist: download the model first, as the first lines of "
            "the config say, or name the folder that holds it"
        )
    files = checkpointer.get("checkpoint_files", None)
    if isinstance(files, ListConfig):
        for name in files:
            _check_weights_file(section, folder / str(name), folder)
    if "HF" in checkpointer._component_ and not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing: checkpoint_dir must be a Hugging Face model folder")


def _check_weights_file(section: str, file: Path, folder: Path) -> None:
    if not file.is_file():
        there = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
        raise UserError(
            f"{section}.checkpoint_files names {file.name}, which is not in {folder} "
            f"(there: {', '.join(there) or 'no weights'})"
        )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error}): download it again") from None


def _meta_model(cfg: DictConfig) -> nn.Module:
    """The model that the config builds, without memory for its weights."""
    try:
        with torch.device("meta"):
            return config.instantiate(cfg.model)
    except Exception as error:
        raise UserError(f"model ({cfg.model._component_}) cannot be built: {error}") from None


def _check_family(cfg: DictConfig, section: str, model: nn.Module) -> None:
    """Compare a Hugging Face config.json, where there is one, with the model that the config builds."""
    config_json = Path(cfg[section].checkpoint_dir) / "config.json"
    if not config_json.is_file():
        return
    try:
        theirs = json.loads(config_json.read_text())
    except ValueError as error:
        raise UserError(f"{config_json} is no valid JSON ({error}): download the model again") from None
    allowed = _FAMILIES.get(theirs.get("model_type"))
    ours = str(cfg[section].get("model_type", ""))
    if allowed and ours not in (*allowed, "REWARD"):
        raise UserError(
            f"{section}.model_type is {ours}, but {config_json.parent} holds a {theirs['model_type']} model: "
            f"set it to {' or '.join(allowed)} and choose the model builder that fits, or another checkpoint_dir"
        )
    embeddings = getattr(getattr(model, "tok_embeddings", None), "weight", None)
    if embeddings is None:
        return  # a model of a kind that is not ours to compare
    built = {
        "vocab_size": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": getattr(model, "num_heads", None),
    }
    for key, value in built.items():
        if value is not None and theirs.get(key, value) != value:
            raise UserError(
                f"the model in {config_json.parent} has {key} {theirs[key]}, but model ({cfg.model._component_}) "
                f"builds {value}: choose the builder that fits, or another {section}.checkpoint_dir"
            )


def _check_output_dir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output_dir {folder} cannot be written ({reason}): choose another output_dir") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nearest(key: str, known) -> str:
    match = get_close_matches(key, known, n=1)
    return f"did you mean {match[0]}?" if match else f"it takes {', '.join(sorted(known))}"
