"""Refuses a wrong config before a model is loaded: one sentence with the key, the value, and what is right."""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torchtune import config, utils
from torchtune.modules import MultiHeadAttention
from torchtune.modules.peft import get_adapter_params

from gmt_tune._installed import release
from gmt_tune.errors import UserError, did_you_mean, one_line
from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.config.components import (
    check_component,
    check_metric_logger,
    import_component,
    try_optimizer,
)
from gmt_tune.integrations.torchtune.config.files import check_files
from gmt_tune.integrations.torchtune.config.keys import KEYS, is_number
from gmt_tune.integrations.torchtune.config.mask import build_gradient_mask
from gmt_tune.masking.optimizers import CompactOptimizer

log = utils.get_logger("INFO")

# How a variable of the user's often ends; no optional key does.
_VARIABLE_ENDS = ("_dir", "_name", "_path", "_root")

# Sections that only configs of torchtune's other recipes have, and what these do.
_OF_OTHER_RECIPES = {
    "datasets": "several data sets at a time",
    "quantizer": "quantization",
    "teacher_model": "knowledge distillation",
    "policy_model": "PPO",
}

_PROFILER = "torchtune.training.setup_torch_profiler"
_LLAMA_PLAN = "torchtune.models.llama3.base_llama_tp_plan"
_QWEN3_PLAN = "gmt_tune.models.qwen3.qwen3_tp_plan"

# Begins a flag of a config that marks one of its keys.
_IS_NEW = "gmt_tune_new_key:"


def check_config(cfg: DictConfig, own_keys: Sequence[str] = (), *, needs_weights: bool = True) -> None:
    """Check keys, values, and the files that a config names. Reads no weights and imports no data.

    ``own_keys`` are top-level keys that a customised recipe reads besides those known here; it checks them itself.
    Without ``needs_weights``, files of weights need not be there. Raises UserError for the first thing that is wrong.
    """
    check_keys(cfg, own_keys)
    optimizer = try_optimizer(cfg.optimizer, cfg.get("lr_scheduler", None))
    check_optimizer(cfg, optimizer)
    check_metric_logger(cfg.metric_logger)
    if cfg.get("collate_fn", None) is not None:
        import_component("collate_fn", cfg.collate_fn)
    model = _meta_model(cfg)
    check_model(cfg, model)
    check_files(cfg, model, needs_weights=needs_weights)
    check_mask(cfg, model, optimizer)


def check_optimizer(cfg: DictConfig, optimizer: object) -> None:
    """Raise UserError if the optimizer that a config makes does not go with the config's other keys."""
    if isinstance(optimizer, CompactOptimizer):
        _check_compact(cfg, optimizer)


def check_model(cfg: DictConfig, model: nn.Module) -> None:
    """Raise UserError if the model that a config builds, on the meta device, does not go with its other keys."""
    if hasattr(getattr(model, "output", None), "tied_module") and "tok_embeddings" in (
        cfg.get("custom_sharded_layers", None) or ()
    ):
        raise UserError(
            "custom_sharded_layers must not name tok_embeddings for this model, whose output layer uses their weights "
            "too: take it out of the list, or set custom_sharded_layers: null"
        )
    _check_tensor_parallel(cfg, model)
    if get_adapter_params(model):
        raise UserError(
            f"model._component_ {cfg.model._component_} has LoRA adapters, and this recipe trains and saves all "
            "weights: take the model without them, or torchtune's own recipe for LoRA, which knows no gradient mask"
        )
    _check_lengths(cfg, model)


def check_mask(cfg: DictConfig, model: nn.Module, optimizer: object) -> None:
    """Raise UserError if a config's mask does not fit its model, or how its optimizer steps."""
    mask = build_gradient_mask(cfg.get("gradient_mask", None), model)
    if mask is not None and cfg.get("optimizer_in_bwd", False) and (scopes := mask.scopes_of_several()):
        raise UserError(
            f"gradient_mask: scope '{scopes[0]}' needs the gradients of all its tensors together, and "
            "optimizer_in_bwd: True has one at a time: use gradient_mask.scope: tensor, or optimizer_in_bwd: False"
        )
    if mask is not None and isinstance(optimizer, CompactOptimizer):
        try:  # on the model without memory, so that the mask says what it cannot do for such an optimizer
            mask.register(config.instantiate(cfg.optimizer, model.parameters()))
        except (TypeError, ValueError) as error:
            raise UserError(f"gradient_mask: {error}") from None


def check_keys(cfg: DictConfig, own_keys: Sequence[str] = (), *, only_known: bool = False) -> None:
    """Check keys and values. Calls nothing that the config names, and looks at no files.

    ``only_known`` imports no component of a package that we do not know; its keys are not checked then.
    """
    _check_interpolations(cfg)
    _check_top_level_keys(cfg, own_keys)
    _check_values(cfg)
    for key in KEYS.values():
        value = cfg.get(key.name, None)
        for i, part in enumerate(value if isinstance(value, ListConfig) else [value]):
            if part is not None and key.gives is not None:
                name = f"{key.name}[{i}]" if isinstance(value, ListConfig) else key.name
                check_component(name, part, **key.gives, only_known=only_known)
    _check_profiler(cfg.get("profiler", None))
    _check_combinations(cfg)


def check_machine(cfg: DictConfig) -> None:
    """Raise UserError if the device is not there, or the processes cannot be split as the config says."""
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
        reason = reason.removeprefix("KeyError raised while resolving interpolation: ").strip("\"'")
        raise UserError(f"{error.full_key or 'the config'} cannot be resolved: {reason}") from None
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def _check_top_level_keys(cfg: DictConfig, own_keys: Sequence[str]) -> None:
    for name, what in _OF_OTHER_RECIPES.items():
        if (
            OmegaConf.is_config(cfg.get(name, None))
            and name not in own_keys
            and not refers_to(OmegaConf.to_yaml(cfg), name)
        ):
            raise UserError(
                f"{name} is no key of this recipe: the config is for a recipe of torchtune's for {what}; run it with "
                "that one, which knows no gradient mask, or take a config for full fine-tuning (`tune ls` shows them)"
            )
    for name, key in KEYS.items():
        if key.needed and "." not in name and name not in cfg:
            raise UserError(f"{name} is missing in the config: `tune cat quickstart` shows a complete one")
        if _is_needed_section(name) and cfg[name] is None:
            raise UserError(f"{name} is null, but every run needs this section: `tune cat quickstart` has one")
    known = [*(name for name, key in KEYS.items() if "." not in name and not key.recipe), *own_keys]
    raw = OmegaConf.to_yaml(cfg)
    for name, value in cfg.items():
        if name in known or refers_to(raw, str(name)):  # a key that others refer to is a user's variable
            continue
        if name in KEYS and value is not None:
            raise UserError(f"{name} is no key of this recipe: tune run {KEYS[name].recipe} is the one for this config")
        right = _meant_key(str(name), known, cfg)
        is_new = cfg._get_flag(f"{_IS_NEW}{name}")
        # Where the right key is a section that every config has, that section itself is there
        may_be_variable = str(name).endswith(_VARIABLE_ENDS) or _is_needed_section(right)
        if is_new or not _is_plain(value) or right in known and not may_be_variable:
            where = " on the command line" if is_new else ""
            hint = f"did you mean {right}?" if right is not None else did_you_mean(str(name), known)
            raise UserError(f"{name} ({value!r}){where} is no key of this recipe: {hint}")
        if value is not None and os.environ.get("RANK", "0") == "0":
            hint = "." if right is None or right in known else f": did you mean {right}?"
            log.warning(f"{name} has no effect: it is no key of this recipe, and no value refers to it{hint}")


def _is_needed_section(name: str | None) -> bool:
    key = KEYS.get(name or "")
    return key is not None and key.needed and key.gives is not None


def mark_new(cfg: DictConfig, keys: Sequence[str]) -> None:
    """Remember that a config's file lacks these top-level keys, so that they are no variables of its author."""
    cfg._set_flag([_IS_NEW + key for key in keys], True)


def _meant_key(key: str, known: Sequence[str], cfg: DictConfig) -> str | None:
    """The known key, or the key of a section, that a top-level key may be meant to be; None if it is like none."""
    for entry in KEYS.values():
        if key in entry.synonyms:
            return entry.name
    inner = {str(name): section for section in cfg if OmegaConf.is_dict(cfg[section]) for name in cfg[section]}
    right = None if key in inner else _meant(key, known)
    in_section = _meant(key, list(inner)) if right is None else None
    return right if in_section is None else f"{inner[in_section]}.{in_section}"


def _meant(key: str, known: Sequence[str]) -> str | None:
    """The known key that another has words of in its order, cut short or not, or is like; None if it is like none."""
    words = key.lower().split("_")
    in_part = [name for name in known if len(words) > 1 and _in_order(words, name.split("_"))]
    return next(iter(in_part + get_close_matches(key.lower(), known, n=1, cutoff=0.7)), None)


def _in_order(words: Sequence[str], others: Sequence[str]) -> bool:
    rest = iter(others)
    return all(any(other.startswith(word) for other in rest) for word in words)


def refers_to(raw: str, key: str) -> bool:
    """Whether a value of the config's text refers to a top-level key: ``${key}``, ``${key.inner}``, ``${key[0]}``."""
    return re.search(rf"\$\{{\s*\.*{re.escape(key)}\s*[.\[}}]", raw) is not None


def _is_plain(value: object) -> bool:
    """Whether it is a text, a number, a truth value, null, or a list of such."""
    return not OmegaConf.is_config(value) or isinstance(value, ListConfig) and all(map(_is_plain, value))


def _check_values(cfg: DictConfig) -> None:
    for key in KEYS.values():
        section, _, name = key.name.rpartition(".")
        holder = cfg.get(section, None) if section else cfg
        if OmegaConf.is_dict(holder) and name in holder and not key.takes.allows(holder[name]):
            raise UserError(f"{key.name} must be {key.takes.words}, got {holder[name]!r}")


def _check_profiler(section: object) -> None:
    """torchtune has one profiler, which the section need not name, and makes it after the model."""
    if section is None:
        return
    if not isinstance(section, DictConfig):
        raise UserError(f"profiler must be a section or null, got {section!r}")
    path = section.get("_component_", None)
    if path not in (None, _PROFILER):
        raise UserError(f"profiler._component_ must be {_PROFILER}, the one that torchtune takes, got {path!r}")
    keys = OmegaConf.to_container(section, resolve=True)
    check_component("profiler", OmegaConf.create({**keys, "_component_": _PROFILER}))


def _check_combinations(cfg: DictConfig) -> None:
    if cfg.get("optimizer_in_bwd", False):
        if cfg.get("fsdp_cpu_offload", False) and release(torch.__version__) < (2, 13):
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
        if cfg.get("on_nonfinite", "error") == "skip":
            raise UserError(
                "optimizer_in_bwd: True needs on_nonfinite: error: it changes weights before all gradients are there, "
                "so no step can be left out"
            )
    if cfg.get("tensor_parallel_dim", 1) > 1:
        if cfg.get("tensor_parallel_plan", None) is None:
            raise UserError(
                f"tensor_parallel_dim: {cfg.tensor_parallel_dim} needs tensor_parallel_plan: set its _component_ to "
                f"{_LLAMA_PLAN}, which fits Llama (but 3.2), Mistral, Qwen 2.5 from 7B on and Phi-4, to {_QWEN3_PLAN} "
                "for Qwen 3 from 8B on, or set tensor_parallel_dim: 1"
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
    checkpointer = cfg.checkpointer
    if cfg.get("save_delta", False) and not (
        str(checkpointer._component_).endswith("FullModelHFCheckpointer")
        and checkpointer.get("safe_serialization", True)
    ):
        raise UserError(
            f"save_delta: {cfg.save_delta} needs a checkpointer that writes safetensors in Hugging Face's format, such "
            "as torchtune.training.FullModelHFCheckpointer without safe_serialization: False: change it, or set "
            "save_delta: False"
        )
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


def _check_compact(cfg: DictConfig, optimizer: CompactOptimizer) -> None:
    """What an optimizer that keeps gradients and states of selected entries alone needs."""
    name = cfg.optimizer._component_
    if cfg.get("gradient_mask", None) is None:
        raise UserError(
            f"optimizer._component_: {name} updates what a gradient_mask selects, and there is none: add the section, "
            "or take torch.optim.AdamW for plain full fine-tuning"
        )
    if cfg.get("optimizer_in_bwd", False):
        raise UserError(
            f"optimizer_in_bwd: True does not work with optimizer._component_: {name}, which frees gradients in "
            "backward by itself: set optimizer_in_bwd: False"
        )
    if cfg.get("fsdp_cpu_offload", False) and release(torch.__version__) < (2, 13):
        raise UserError(
            f"fsdp_cpu_offload: True does not work with optimizer._component_: {name} on torch {torch.__version__}, "
            "which takes gradients in before they have arrived in the host's memory: set fsdp_cpu_offload: False, or "
            "install torch 2.13 or newer"
        )
    norms = cfg.get("clip_grad_norm", None), optimizer.max_grad_norm
    if None not in norms and float(norms[0]) != norms[1]:
        raise UserError(
            f"clip_grad_norm is {norms[0]} and optimizer.max_grad_norm is {norms[1]}, and both mean the same: set one "
            "of them"
        )


def _meta_model(cfg: DictConfig) -> nn.Module:
    """The model that the config builds, without memory for its weights."""
    try:
        with torch.device("meta"):
            return config.instantiate(cfg.model)
    except Exception as error:
        raise UserError(f"model ({cfg.model._component_}) cannot be built: {one_line(error)}") from None


def _check_tensor_parallel(cfg: DictConfig, model: nn.Module) -> None:
    """The known plans split heads, and name what Llama and Qwen 3 have: what is beside it would fail or be wrong."""
    if cfg.get("tensor_parallel_dim", 1) < 2:
        return
    plan = cfg.tensor_parallel_plan._component_
    if plan not in (_LLAMA_PLAN, _QWEN3_PLAN):
        return
    remedy = "set tensor_parallel_dim: 1"
    attentions = [layer.attn for layer in getattr(model, "layers", ()) if hasattr(layer, "attn")]
    if not all(isinstance(attention, MultiHeadAttention) for attention in attentions):
        reason = "an attention of its own, whose heads torchtune does not split"
    elif hasattr(getattr(model, "output", None), "tied_module"):
        reason = "an output layer that uses the embeddings"
    elif plan == _LLAMA_PLAN and any(attention.q_norm is not None for attention in attentions):
        reason = "norms of queries and keys, of which each device would see the gradients of its own heads alone"
        remedy = f"take {_QWEN3_PLAN}, or {remedy}"
    else:
        return
    raise UserError(f"tensor_parallel_plan._component_: {plan} does not fit this model, which has {reason}: {remedy}")


def _check_lengths(cfg: DictConfig, model: nn.Module) -> None:
    rows, fits = (cfg.get("tokenizer", None) or {}).get("max_seq_len", None), getattr(model, "max_seq_len", None)
    if is_number(rows) and is_number(fits) and rows > fits:
        raise UserError(
            f"tokenizer.max_seq_len is {rows}, but the model takes at most {fits} tokens: lower it, or raise "
            "model.max_seq_len"
        )
