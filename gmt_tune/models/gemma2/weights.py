"""Names and layouts of Gemma 2's weights in a Hugging Face folder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune, gemma2_tune_to_hf

from gmt_tune.models.tied import without_copy_of_embeddings

# What torchtune 0.6.1 exchanges: the norm before the MLP is ``pre_feedforward_layernorm``
_EXCHANGED = {"mlp_norm.scale": "mlp_scale.scale", "mlp_scale.scale": "mlp_norm.scale"}


def hf_to_tune(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder by torchtune's names and layout.

    Args:
        weights: tensor by name, from all files of the folder; a copy of the embeddings (``lm_head.weight``), which
            some files have, is left out.
        config: the folder's config.json.

    Raises:
        UserError: if ``lm_head.weight`` is no copy of the embeddings.
        Exception: torchtune's, for a name that no weight of this family has.
    """
    converted = gemma2_hf_to_tune(without_copy_of_embeddings(weights), **_sizes(config))
    return {_exchanged(name).replace("norm.rms_norm.", "norm."): weight for name, weight in converted.items()}


def tune_to_hf(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of :func:`hf_to_tune`.

    Args:
        weights: tensor by torchtune's name.
        config: the folder's config.json.
    """
    theirs = {"norm.rms_norm.scale" if name == "norm.scale" else _exchanged(name): w for name, w in weights.items()}
    return gemma2_tune_to_hf(theirs, **_sizes(config))


def _exchanged(name: str) -> str:
    """``layers.3.mlp_norm.scale`` for ``layers.3.mlp_scale.scale`` and the other way round; other names as they are."""
    layer, _, part = name.rpartition(".mlp_")
    return f"{layer}.{_EXCHANGED['mlp_' + part]}" if layer and "mlp_" + part in _EXCHANGED else name


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "dim": config["hidden_size"],
        "head_dim": config["head_dim"],
    }
