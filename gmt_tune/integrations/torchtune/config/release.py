"""Refuses a model whose config.json says that the release computes something else than what the config builds."""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torchtune.config._utils import _get_component_from_path
from torchtune.training.checkpointing._utils import ModelType

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.config.keys import is_number
from gmt_tune.models.checkpointer import OWN_FAMILIES

# "model_type" of a Hugging Face config.json to the model types of torchtune's checkpointers.
_FAMILIES = {
    "llama": ("LLAMA2", "LLAMA3", "LLAMA3_2"),
    "mistral": ("MISTRAL",),
    "gemma": ("GEMMA",),
    "gemma2": ("gmt_tune.models.gemma2",),
    "phi3": ("PHI3_MINI", "PHI4"),
    "qwen2": ("QWEN2",),
    "qwen3": ("gmt_tune.models.qwen3",),
}

# The checkpointer for model types that are modules.
OF_MODULES = "gmt_tune.models.FullModelHFCheckpointer"

# Where builders are, other than torchtune's: some or all of torchtune's do not fit the releases.
_BUILDERS = {
    "gemma2": "gmt_tune.models.gemma2",
    "mistral": "gmt_tune.models.mistral or torchtune",
    "phi3": "gmt_tune.models.phi4 or torchtune",
    "qwen3": "gmt_tune.models.qwen3",
}

# The rotary base of a config.json that names none, as Llama 2's first ones: transformers' default for these families.
_ROPE_THETA = 10000.0

# Keys of a config.json to what torchtune's builders call them, where they take them.
_KEYS_OF_BUILDERS = {"rope_theta": "rope_base", "rms_norm_eps": "norm_eps"}

# Keys of a config.json to where torchtune's models have them.
_PARTS_OF_MODELS = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "layers.0.attn.num_kv_heads",
    "head_dim": "layers.0.attn.head_dim",
    "intermediate_size": "layers.0.mlp.w1.out_features",
    "rms_norm_eps": "norm.eps",
    "rope_theta": "layers.0.attn.pos_embeddings.base",
    "sliding_window": "layers.0.attn.sliding_window_size",
}

# Bounds of scores and logits, which no other family has.
_SOFT_CAPS = {
    "attn_logit_softcapping": "layers.0.attn.softcapping",
    "final_logit_softcapping": "output.linear.softcap",
}

# What stretches positions in Llama 3.1 and 3.2: key in a config.json, torchtune's name, and the releases' value.
_LLAMA3_SCALING = {
    "factor": ("scale_factor", 8.0),
    "low_freq_factor": ("low_freq_factor", 1.0),
    "high_freq_factor": ("high_freq_factor", 4.0),
    "original_max_position_embeddings": ("old_context_len", 8192.0),
}


def check_release(cfg: DictConfig, section: str, model: nn.Module) -> None:
    """Compare a Hugging Face config.json, where there is one, with the model that the config builds."""
    config_json = Path(cfg[section].checkpoint_dir) / "config.json"
    if not config_json.is_file():
        return
    try:
        theirs = dict(json.loads(config_json.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config_json} is no valid JSON ({one_line(error)}): download the model again") from None
    allowed = _FAMILIES.get(str(theirs.get("model_type")))
    ours = str(cfg[section].get("model_type", ""))
    is_known = ours in ModelType.__members__ or ours in OWN_FAMILIES  # and no module of the user's
    if allowed and is_known and ours not in (*allowed, "REWARD"):
        by = f" with {section}._component_={OF_MODULES}" if allowed[0] in OWN_FAMILIES else ""
        raise UserError(
            f"{section}.model_type is {ours}, but {config_json.parent} holds a {theirs['model_type']} model: "
            f"set it to {' or '.join(allowed)}{by} and choose the model builder that fits, or another checkpoint_dir"
        )
    built = described(model)
    if ours == "REWARD":
        built.pop("tie_word_embeddings", None)  # its output layer is another
    theirs |= _rope_of(theirs) | {key: "none" for key in _SOFT_CAPS if theirs.get(key, "") is None}
    for key, value in built.items():
        read = theirs.get(key, None)
        are_numbers = is_number(read) and is_number(value)
        is_same = math.isclose(read, value, rel_tol=1e-6) if are_numbers else read == value  # type: ignore[arg-type]
        if value is not None and read is not None and not is_same:
            raise UserError(
                f"the model in {config_json.parent} has {key} {read}, but model ({cfg.model._component_}) "
                f"builds {value}: {_way_out(cfg.model, key, read, str(theirs.get('model_type')))}, or choose another "
                f"{section}.checkpoint_dir"
            )


def _way_out(cfg_model: DictConfig, key: str, value: Any, family: str) -> str:
    """How to build a model with a value of a config.json: by a key of its builder, or else by another builder."""
    name = _KEYS_OF_BUILDERS.get(key)
    if name is not None and name in inspect.signature(_get_component_from_path(cfg_model._component_)).parameters:
        return f"set model.{name}: {value}"
    if family in _BUILDERS:
        return f"choose the builder of this release in {_BUILDERS[family]}, if there is one"
    return "choose torchtune's builder of this release, if it has one"


def described(model: nn.Module) -> dict[str, Any]:
    """What a model is, by the keys of a Hugging Face config.json; empty for one of a kind that we do not know."""
    embeddings, layers = _part(model, "tok_embeddings.weight"), _part(model, "layers")
    if embeddings is None or not layers:
        return {}
    output, attention = _part(model, "output"), _part(model, "layers.0.attn")
    scaling_of_queries = _part(attention, "scaling")
    built = {
        "vocab_size": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "num_hidden_layers": len(layers),
        **{key: _part(model, path) for key, path in _PARTS_OF_MODELS.items()},
        **{key: _part(model, path) or "none" for key, path in _SOFT_CAPS.items()},
        "query_pre_attn_scalar": _part(attention, "head_dim") if scaling_of_queries is None else scaling_of_queries**-2,
        "tie_word_embeddings": hasattr(output, "tied_module") or _part(output, "weight") is embeddings,
    }
    if built["rope_theta"] is not None:
        positions = _part(attention, "pos_embeddings")
        built["partial_rotary_factor"] = positions.dim / attention.head_dim if hasattr(positions, "dim") else None
        scaling = {key: _part(positions, ours) for key, (ours, _) in _LLAMA3_SCALING.items()}
        built["rope_scaling"] = _scaling(None if scaling["factor"] is None else "llama3", scaling)
    return built


def _part(model: Any, path: str) -> Any:
    """An attribute of an attribute of a model; None where there is none."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def _rope_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of rotary positions, which transformers 5 has in ``rope_parameters``."""
    rope = theirs.get("rope_parameters", None)
    if not isinstance(rope, dict):
        scaling = theirs.get("rope_scaling", None)
        rope = {"rope_theta": theirs.get("rope_theta", None), **(scaling if isinstance(scaling, dict) else {})}
    if any(isinstance(value, dict) for value in rope.values()):
        return {}  # other ones for other layers, as in no model that torchtune builds
    theta = rope.get("rope_theta", None)
    if theta is None and str(theirs.get("model_type")) in _FAMILIES:
        theta = _ROPE_THETA
    return {
        "rope_theta": theta,
        "rope_scaling": _scaling(rope.get("rope_type", rope.get("type", None)), rope),
        "partial_rotary_factor": rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", None)),
    }


def _scaling(kind: object, rope: Mapping[str, Any]) -> str:
    """How positions are stretched, in words that are the same for what computes the same."""
    factor = rope.get("factor", None)
    # "dynamic" begins to stretch beyond the positions that the model was trained on
    if kind in (None, "default", "dynamic") or factor == 1:
        return "none"
    if kind != "llama3":
        return f"{kind}" if factor is None else f"{kind} (factor {factor})"
    values = {key: rope.get(key, default) for key, (_, default) in _LLAMA3_SCALING.items()}
    return f"llama3 ({', '.join(f'{k} {float(v) if is_number(v) else v}' for k, v in values.items())})"
