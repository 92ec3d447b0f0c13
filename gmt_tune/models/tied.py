"""Files that hold the embeddings twice, as some published ones of models with tied embeddings do."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gmt_tune.errors import UserError


def check_copy_of_embeddings(output: Tensor, embeddings: Tensor, model: str, more: str = "") -> None:
    """Raise UserError if the output layer of a model's files is not a copy of the embeddings, which the model uses.

    Args:
        output, embeddings: [vocabulary, width].
        model: what a message calls the model.
        more: what else is to be done, at the end of a message.
    """
    if not torch.equal(output, embeddings):
        raise UserError(
            f"{model} uses its embeddings as the output layer, but the files in checkpoint_dir have another one "
            f"(lm_head.weight): choose a builder that does not tie the two{more}"
        )


def without_copy_of_embeddings(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, without ``lm_head.weight``, for a model that has none.

    Raises:
        UserError: if it is no copy of the embeddings.
    """
    output = weights.get("lm_head.weight", None)
    if output is not None:
        embeddings = weights["model.embed_tokens.weight"]
        check_copy_of_embeddings(output, embeddings, "the model", ", and write so into config.json")
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
