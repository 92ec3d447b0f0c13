"""Files that hold the embeddings twice, as some published ones of models with tied embeddings do."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gmt_tune.errors import UserError


def without_copy_of_embeddings(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, without ``lm_head.weight``, for a model that has none.

    Raises:
        UserError: if it is no copy of the embeddings.
    """
    output = weights.get("lm_head.weight", None)
    if output is not None and not torch.equal(output, weights["model.embed_tokens.weight"]):
        raise UserError(
            "the model uses its embeddings as the output layer, but the files in checkpoint_dir have another one "
            "(lm_head.weight): choose a builder that does not tie the two, and write so into config.json"
        )
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
