"""The model's part of a checkpoint: what torchtune's checkpointer writes, at a place and with a dtype of our choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training
from torchtune.training.checkpointing import _checkpointer
from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY, ModelType
from torchtune.utils import get_logger

from gmt_tune._quiet import quieter
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import deferred
from gmt_tune.integrations.torchtune.checkpoint import folder as folders
from gmt_tune.integrations.torchtune.checkpoint import state as training_state
from gmt_tune.integrations.torchtune.checkpoint.manifest import MANIFEST
from gmt_tune.models.checkpointer import FullModelHFCheckpointer
from gmt_tune.models.origin import CARD, read_json_object
from gmt_tune.reporting.weights_reader import DELTA

# What torchtune's loader for Hugging Face folders reads of config.json, for the model types that it knows by name.
_OF_ALL = ("num_attention_heads", "num_key_value_heads", "hidden_size")
_MORE = {"QWEN2": ("tie_word_embeddings",), "LLAMA3_VISION": (), "CLIP_TEXT": (), "T5_ENCODER": ()}


def check_config_json(checkpointer: DictConfig) -> None:
    """Raise UserError if the config.json of a Hugging Face folder lacks what the loader needs.

    Args:
        checkpointer: section of a config.
    """
    if not str(checkpointer.get("_component_", "")).endswith("FullModelHFCheckpointer"):
        return
    file = Path(checkpointer.checkpoint_dir) / "config.json"
    kind = str(checkpointer.get("model_type", ""))
    if kind not in ModelType.__members__:
        return  # the module of a family, which reads of it what it needs
    keys = _MORE.get(kind, _OF_ALL) + (_OF_ALL if kind == "QWEN2" else ())
    there = read_json_object(file) or {}
    missing = [key for key in keys if there.get(key) is None]
    if missing:
        raise UserError(
            f"{file} does not say {', '.join(missing)}: checkpoint_dir must be the Hugging Face folder of a model of "
            f"model_type {kind}; download it again, or choose the model_type that fits"
        )


def writes_one_by_one(checkpointer) -> bool:
    """Whether :func:`write_model` reads each weight when it is written, and none a moment before.

    It does for torchtune's Hugging Face checkpointer and ours with safetensors, but not for Llama 3.2 Vision, whose
    positions are put together in place.
    """
    return (
        type(checkpointer) in (training.FullModelHFCheckpointer, FullModelHFCheckpointer)
        and checkpointer._safe_serialization
        and checkpointer._model_type is not ModelType.LLAMA3_VISION
    )


def write_model(checkpointer, weights: Mapping[str, Tensor], folder: Path, files_from: Path) -> None:
    """Let torchtune's checkpointer write a model folder at ``folder`` instead of ``output_dir/epoch_N``.

    Args:
        checkpointer: the config's.
        weights: of the model, by torchtune's names; deferred ones only where :func:`writes_one_by_one`.
        folder: exists; gets the files.
        files_from: model folder whose files other than weights are copied; not its README.md, which is about that one.
    """
    # Of weights in several dtypes, transformers names that of the first parameter too
    dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), None)
    given = checkpointer._output_dir, checkpointer._checkpoint_dir
    checkpointer._output_dir, checkpointer._checkpoint_dir = folder, files_from
    SUFFIXES_TO_NOT_COPY.append(".distcp")  # the state of the checkpoint that this run went on from
    to_write, save_file = dict(weights), _checkpointer.save_file
    if writes_one_by_one(checkpointer):  # no weight that is converted has a second copy before its turn
        to_write = {name: deferred.as_deferred(weight) for name, weight in weights.items()}
        _checkpointer.save_file = deferred.save_file
    try:
        with quieter(get_logger()):  # it would name the folder in which a checkpoint is not whole yet
            checkpointer.save_checkpoint({training.MODEL_KEY: to_write}, epoch=0, intermediate_checkpoint=False)
    finally:
        _checkpointer.save_file = save_file
        checkpointer._output_dir, checkpointer._checkpoint_dir = given
        SUFFIXES_TO_NOT_COPY.remove(".distcp")
    for path in sorted((folder / "epoch_0").iterdir()):
        if path.name in (CARD, MANIFEST, training_state.FOLDER):  # of that checkpoint too
            folders.remove(path)
        else:
            path.rename(folder / path.name)
    (folder / "epoch_0").rmdir()
    _name_dtype(folder / "config.json", dtype)


def _name_dtype(config_json: Path, dtype: torch.dtype | None) -> None:
    """Let a Hugging Face config.json say what its weights were saved in: by default, they are loaded in that."""
    config = read_json_object(config_json)
    if config is None or dtype is None:
        return
    before = json.dumps(config)
    if not config.keys() & {"dtype", "torch_dtype"}:
        config["torch_dtype"] = None  # which every release of transformers reads
    # Models of text and images have a config for each
    nested = [part for key, part in config.items() if key.endswith("_config") and key != "quantization_config"]
    for part in (config, *nested):
        if isinstance(part, dict):
            part.update({key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in part})
    if json.dumps(config) != before:
        config_json.unlink()  # a copy of a file that may be read-only
        config_json.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_files(folder: Path) -> list[str]:
    """Names of the files with the model's weights."""
    kinds = (".safetensors", ".bin", ".pt", ".pth")
    return sorted(path.name for path in folder.iterdir() if path.suffix in kinds and path.name != DELTA)
