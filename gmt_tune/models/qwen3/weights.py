"""Names of Qwen 3's weights in the Hugging Face layout, which has the same tensors as torchtune's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchtune.models.convert_weights import _FROM_HF, get_mapped_key

from gmt_tune.models.tied import without_copy_of_embeddings

_TO_TUNE = _FROM_HF | {
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attn.q_norm.scale",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attn.k_norm.scale",
}
_TO_HF = {ours: theirs for theirs, ours in _TO_TUNE.items()}


def hf_to_tune(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder by torchtune's names.

    Args:
        weights: tensor by name, from all files of the folder. Where the embeddings are tied, a copy of them
            (``lm_head.weight``), which some releases have, is left out.
        config: the folder's config.json.

    Raises:
        UserError: if ``lm_head.weight`` is no copy where it must be one.
        Exception: torchtune's, for a name that no weight of this family has.
    """
    if config.get("tie_word_embeddings", False):
        weights = without_copy_of_embeddings(weights)
    return {get_mapped_key(name, _TO_TUNE): weight for name, weight in weights.items()}


def tune_to_hf(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of :func:`hf_to_tune`.

    Args:
        weights: tensor by torchtune's name.
        config: the folder's config.json.
    """
    return {get_mapped_key(name, _TO_HF): weight for name, weight in weights.items()}
