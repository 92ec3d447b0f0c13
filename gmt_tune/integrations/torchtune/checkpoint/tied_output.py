"""Weights of an output layer that a model with tied embeddings has no place for."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import config

from gmt_tune.models.tied import check_copy_of_embeddings


def drop_tied_output(state_dict: dict[str, Any], cfg_model: DictConfig) -> None:
    """Take the output layer out of what was read from files, if the model uses its embeddings for it.

    Files of merged models, and some published ones, hold the embeddings twice.

    Args:
        state_dict: parameter by torchtune's name; it is changed.
        cfg_model: the config's section ``model``.

    Raises:
        UserError: if the output layer of the files is not a copy of the embeddings.
    """
    output, embeddings = state_dict.get("output.weight", None), state_dict.get("tok_embeddings.weight", None)
    if not isinstance(output, Tensor) or not isinstance(embeddings, Tensor):
        return
    with torch.device("meta"):
        if "output.weight" in config.instantiate(cfg_model).state_dict():
            return
    check_copy_of_embeddings(output, embeddings, f"model ({cfg_model._component_})")
    del state_dict["output.weight"]
